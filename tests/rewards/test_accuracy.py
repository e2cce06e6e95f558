import threading
import time

import pytest

from es_trainer.rewards import accuracy
from es_trainer.rewards.accuracy import accuracy_reward
from es_trainer.rewards.scorer import Scorer


def in_thread(function):
    """What the function returns in a background thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_right_wrong_missing_and_unknown_answers():
    completions = [
        r"Half of it, so \boxed{\frac{1}{2}}.",
        [{"role": "assistant", "content": r"So $\boxed{0.5}$."}],
        r"\boxed{2}",
        "one half",
        r"\boxed{1}",
    ]
    solution = [r"\boxed{\frac{1}{2}}"] * 4 + ["nothing to parse"]
    assert accuracy_reward(completions=completions, solution=solution, level=[1] * 5) == [1.0, 1.0, 0.0, 0.0, None]


def test_what_math_verify_gives_up_in_a_thread():
    # TRL alone holds the interpreter for good here
    start = time.perf_counter()
    completions = [r"\boxed{9^{9^9}}", r"\boxed{1}"]
    assert in_thread(lambda: accuracy_reward(completions, [r"\boxed{1}"] * 2)) == [0.0, 1.0]
    assert time.perf_counter() - start < 60


def test_a_grader_that_is_ended_by_its_time_limit_is_replaced(monkeypatch):
    monkeypatch.setattr(accuracy, "CPU_SECONDS", 1)
    monkeypatch.setattr(accuracy, "_grader", None)
    assert accuracy_reward([r"\boxed{9^{9^9}}"], [r"\boxed{1}"]) == [0.0]
    assert accuracy._grader is None
    assert accuracy_reward([r"\boxed{1}"], [r"\boxed{1}"]) == [1.0]


def test_an_interrupted_grader_is_not_asked_again(monkeypatch):
    accuracy_reward([r"\boxed{1}"], [r"\boxed{1}"])
    late = accuracy._grader

    class InterruptedAfterSending:
        def __init__(self, stdin):
            self.write, self._flush = stdin.write, stdin.flush

        def flush(self):
            self._flush()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(late, "stdin", InterruptedAfterSending(late.stdin))
        accuracy_reward([r"\boxed{1}"], [r"\boxed{1}"])
    assert accuracy_reward([r"\boxed{2}"], [r"\boxed{1}"]) == [0.0]


def test_a_grader_that_cannot_start_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(accuracy, "_grader", None)
    with pytest.raises(RuntimeError, match="status 1; .*math-verify"):
        accuracy_reward([r"\boxed{1}"], [r"\boxed{1}"])


def test_its_name_in_logs_is_that_of_trl():
    assert Scorer(accuracy_reward).names == ["accuracy_reward"]
