import concurrent.futures
import os
import subprocess
import sys
import threading
import time

import pytest
from transformers import TrainerState

from es_trainer.rewards.accuracy import accuracy_reward
from es_trainer.rewards.caller import CallSettings
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


def test_what_math_verify_cannot_interrupt_counts_as_wrong(monkeypatch):
    monkeypatch.setattr(accuracy_reward, "reward_timeout", 6)  # the next one needs a new process, which imports
    assert accuracy_reward([r"\boxed{9^{9^9}}", r"\boxed{1}"], [r"\boxed{1}"] * 2) == [0.0, 1.0]


def test_answers_are_those_of_what_was_asked_after_an_interruption(monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    accuracy_reward([r"\boxed{1}"], [r"\boxed{1}"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(concurrent.futures.Future, "result", interrupt)
        accuracy_reward([r"\boxed{1}"], [r"\boxed{1}"])
    assert accuracy_reward([r"\boxed{2}"], [r"\boxed{1}"]) == [0.0]


def test_a_grader_that_cannot_start_is_an_error(tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    code = "from es_trainer.rewards import accuracy_reward; accuracy_reward(['1'], ['1'])"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode != 0
    assert "'accuracy_reward' raised" in run.stderr
    assert "broken" in run.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_run(workers):
    """With and without workers of the run's, it is called in processes that can be ended."""
    scorer = Scorer(accuracy_reward, calls=CallSettings(workers))
    rows = [{"prompt": "", "solution": r"\boxed{1}"}] * 3
    completions = [[{"role": "assistant", "content": rf"\boxed{{{answer}}}"}] for answer in (1, 2, 1)]
    assert scorer(rows, completions, [[1]] * 3, TrainerState()).total.tolist() == [1.0, 0.0, 1.0]


def test_its_name_in_logs_is_that_of_trl():
    assert Scorer(accuracy_reward).names == ["accuracy_reward"]
