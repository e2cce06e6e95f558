"""Reward functions in a pool of processes, with time limits and further calls after exceptions."""

import asyncio
import gc
import itertools
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import letters, logs
from transformers import TrainerState

from es_trainer.rewards import call as call_module
from es_trainer.rewards import caller, per_member, time_limit
from es_trainer.rewards.call import Retries
from es_trainer.rewards.caller import CallSettings
from es_trainer.rewards.scorer import Scorer


COMPLETIONS = ["a", "bbbb", "cc", "ddd"]
ROWS = [{"prompt": f"prompt {text}", "bonus": i} for i, text in enumerate(COMPLETIONS)]
SUMS = [1.0, 5.0, 4.0, 6.0]


def score(functions, completions=COMPLETIONS, of_environments=(), **settings):
    scorer = Scorer(functions, of_environments=list(of_environments), calls=CallSettings(**settings))
    return scorer(ROWS, completions, [[1]] * len(ROWS), TrainerState(global_step=7))


def length_and_bonus(completions, bonus, trainer_state, log_extra, log_metric, **kwargs):
    time.sleep(0.02 * (4 - bonus[-1]))  # the first one ends last
    bonus[0] += 0  # they are its own
    log_extra("length", [len(text) for text in completions])
    log_metric("own/step", trainer_state.global_step)
    return [float(len(text) + more) for text, more in zip(completions, bonus, strict=True)]


@per_member
def longest(completions, **kwargs):
    return max(map(len, completions))


def number_of_completions(completions, log_extra, **kwargs):
    log_extra("process", [os.getpid()] * len(completions))
    return [float(len(completions))] * len(completions)


def hangs_at_cc(completions, log_extra, **kwargs):
    if completions == ["cc"]:
        math.factorial(10**8)  # holds the interpreter: no signal handler of Python's and no thread ends it
    log_extra("length", [len(text) for text in completions])
    return [1.0] * len(completions)


@time_limit(1.5, reward=0.0)
def limited(completions, **kwargs):
    return hangs_at_cc(completions, **kwargs)


def exits_at_cc(completions, **kwargs):
    if completions == ["cc"]:
        os._exit(3)
    return [1.0]


class NotPicklableError(Exception):
    def __init__(self, one, another):
        super().__init__(f"{one} and {another}")


def raises_at_cc(completions, **kwargs):
    if completions == ["cc"]:
        raise NotPicklableError("this", "that")
    return [1.0]


class Busy(Exception):
    pass


def is_busy_at_first(completions, bonus, folder, log_extra, **kwargs):
    """Fails twice for each completion, having logged and changed what it got."""
    log_extra("seen", list(completions))
    path = Path(folder[0]) / completions[0]
    tries = len(path.read_text()) if path.exists() else 0
    path.write_text("x" * (tries + 1))
    if tries < 2:
        completions[0] = "changed"
        raise Busy("come back later")
    return [float(len(text)) for text in completions]


class Stateless:
    def __call__(self, completions, **kwargs):
        return [2.0] * len(completions)


def here(completions, **kwargs):
    return [float(os.getpid())] * len(completions)


def counter():
    process, numbers = [], (float(i) for i in itertools.count())

    def count(completions, **kwargs):
        process.append(os.getpid())
        return [next(numbers) for _ in completions]

    return count, process


def length():
    process = []

    def of_each(completions, log_extra, **kwargs):
        process.append(os.getpid())
        log_extra("of_each", process[-1:])
        return [float(len(text)) for text in completions]

    return of_each, process


@pytest.fixture(scope="module")
def pooled():
    """What many functions say in one pool, and what the trainer says of them: to start it takes longer than to ask."""
    (count, count_in), (of_each, of_each_in) = counter(), length()
    functions = [length_and_bonus, longest, Stateless(), number_of_completions, hangs_at_cc, limited, count, of_each]
    warnings, logger = [], logging.getLogger(caller.__name__)
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caller, "PATIENCE", 1.0)
        scores = score(functions, of_environments=[here], workers=2, timeout=3.0)
    logger.removeHandler(handler)
    names = [getattr(function, "__name__", "Stateless") for function in [*functions, here]]
    columns = dict(zip(names, scores.by_function.T, strict=True))
    return SimpleNamespace(scores=scores, of=columns, warnings=warnings, count_in=count_in, of_each_in=of_each_in)


def test_rewards_and_logs_do_not_depend_on_workers(pooled):
    alone = score([length_and_bonus, longest, Stateless()])
    np.testing.assert_array_equal(alone.by_function, [[total, 4.0, 2.0] for total in SUMS])
    np.testing.assert_array_equal(pooled.scores.by_function[:, :3], alone.by_function)
    assert pooled.scores.extra["length"] == alone.extra["length"] == [1, 4, 2, 3]
    assert set(pooled.scores.metrics["own/step"]) == set(alone.metrics["own/step"]) == {7.0}


def test_a_function_gets_one_completion_in_a_process_of_its_own_only_if_there_are_workers(pooled):
    alone = score(number_of_completions)
    assert alone.total.tolist() == [4.0] * 4
    assert set(alone.extra["process"]) == {os.getpid()}
    assert pooled.of["number_of_completions"].tolist() == [1.0] * 4
    assert os.getpid() not in pooled.scores.extra["process"]


def test_what_takes_too_long_does_not_apply(pooled):
    """The process that was ended is replaced, and nothing else is lost."""
    np.testing.assert_array_equal(pooled.of["hangs_at_cc"], [1.0, 1.0, np.nan, 1.0])
    assert pooled.scores.metrics["rewards/hangs_at_cc/timed_out"] == [0.0, 0.0, 1.0, 0.0]
    assert pooled.scores.extra["length_2"] == [1, 4, None, 3]
    warning = "'hangs_at_cc' took more than 3.0 seconds for the completion 'cc' of the prompt 'prompt cc'"
    assert sum(warning in text for text in pooled.warnings) == 1
    assert 3 <= pooled.scores.seconds < 15


def test_a_function_can_have_a_limit_of_its_own(pooled):
    assert pooled.of["limited"].tolist() == [1.0, 1.0, 0.0, 1.0]
    assert any("'limited' took more than 1.5 seconds" in text for text in pooled.warnings)


def test_a_limit_of_its_own_needs_no_workers():
    assert score(limited).total.tolist() == [1.0, 1.0, 0.0, 1.0]


def test_functions_that_cannot_be_sent_stay_here(pooled):
    assert pooled.count_in == [os.getpid()]
    assert pooled.of["count"].tolist() == [0.0, 1.0, 2.0, 3.0]
    reason = "'count' cannot be sent to another process (TypeError: cannot pickle 'generator' object)"
    assert [text for text in pooled.warnings if "cannot be sent" in text][0].startswith(f"Reward function {reason}")
    assert sum("cannot be sent" in text for text in pooled.warnings) == 1


def test_functions_inside_others_are_copied(pooled):
    assert pooled.of["of_each"].tolist() == [1.0, 4.0, 2.0, 3.0]
    assert pooled.of_each_in == []
    assert os.getpid() not in pooled.scores.extra["of_each"]


def test_rewards_of_environments_stay_here(pooled):
    assert pooled.of["here"].tolist() == [os.getpid()] * 4


def test_a_silent_function_is_named_with_the_row_it_is_at(pooled):
    expected = "'hangs_at_cc' has been running for 1 seconds for the completion 'cc' of the prompt 'prompt cc'"
    assert any(expected in text for text in pooled.warnings)


def test_a_run_does_not_depend_on_workers(trainer):
    runs = [trainer(reward_funcs=[letters, longest], max_steps=2, reward_workers=workers) for workers in (0, 2)]
    for run in runs:
        run.train()
    one, other = (run.model.state_dict() for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [log["reward"] for log in logs(runs[0])] == [log["reward"] for log in logs(runs[1])]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises_at_cc, "'raises_at_cc' raised NotPicklableError: this and that"),
        (exits_at_cc, "'exits_at_cc' ended its process with status 3 for the completion 'cc'"),
    ],
    ids=["exception", "exit"],
)
def test_what_fails_in_a_process_is_an_error_here(function, message):
    with pytest.raises(RuntimeError, match=message) as error:
        score(function, workers=2)
    if function is raises_at_cc:
        assert "in raises_at_cc" in error.value.__notes__[0], "the traceback of the process is lost"


def test_async_functions_judge_as_many_completions_at_a_time_as_there_are_workers():
    running, most = set(), []

    async def judge(completions, **kwargs):
        running.add(completions[0])
        most.append(len(running))
        await asyncio.sleep(0.05)
        running.discard(completions[0])
        return [float(len(text)) for text in completions]

    assert score(judge, workers=3).total.tolist() == [1.0, 4.0, 2.0, 3.0]
    assert max(most) == 3


def test_async_functions_have_time_limits():
    async def judge(completions, **kwargs):
        if completions == ["cc"]:
            await asyncio.sleep(3600)
        return [1.0]

    async def raises(completions, **kwargs):
        raise TimeoutError("of the judge's own")

    scores = score(judge, workers=2, timeout=0.3)
    np.testing.assert_array_equal(scores.total, [1.0, 1.0, np.nan, 1.0])
    assert scores.metrics["rewards/judge/timed_out"] == [0.0, 0.0, 1.0, 0.0]
    with pytest.raises(RuntimeError, match="'raises' raised TimeoutError: of the judge's own"):
        score(raises, workers=2, timeout=60)


@pytest.mark.parametrize("workers", [0, 2])
def test_named_exceptions_are_followed_by_another_call(tmp_path, monkeypatch, caplog, workers):
    monkeypatch.setattr(call_module, "FIRST_WAIT", 0.01)
    completions, rows = COMPLETIONS[:2], [{**row, "folder": str(tmp_path)} for row in ROWS[:2]]
    scorer = Scorer(is_busy_at_first, calls=CallSettings(workers, retries=Retries((Busy,), 3)))
    with caplog.at_level("WARNING"):
        scores = scorer(rows, completions, [[1]] * 2, TrainerState())
    assert scores.total.tolist() == [1.0, 4.0]
    assert scores.extra == {"seen": ["a", "bbbb"]}, "what the calls before logged, or changed, is still there"
    if workers == 0:
        assert "'is_busy_at_first' raised Busy: come back later. It is called again in" in caplog.text
        assert caplog.text.count("called again") == 2


def test_further_calls_end_and_other_exceptions_end_at_once(monkeypatch):
    monkeypatch.setattr(call_module, "FIRST_WAIT", 0.01)
    calls = []

    async def judge(**kwargs):
        calls.append("judge")
        raise Busy("for good")

    def grader(**kwargs):
        calls.append("grader")
        raise KeyError("a mistake")

    with pytest.raises(RuntimeError, match="'judge' raised Busy: for good"):
        score(judge, retries=Retries((Busy,), 2))
    with pytest.raises(RuntimeError, match="'grader' raised KeyError"):
        score(grader, retries=Retries((Busy,), 2))
    assert calls == ["judge"] * 3 + ["grader"]


def test_waits_grow(monkeypatch):
    """1, 2, 4, ... seconds up to a minute, and up to one more, so that not all callers come back at once."""
    slept, here = [], threading.get_ident()  # other threads may sleep, too
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: slept.append(s) if threading.get_ident() == here else sleep(s))

    def grader(**kwargs):
        raise Busy("for good")

    with pytest.raises(RuntimeError):
        score(grader, retries=Retries((Busy,), 8))
    for number, seconds in enumerate(slept):
        assert min(60, 2**number) <= seconds <= min(60, 2**number) + 1
    assert len(slept) == 8


def test_names_of_exceptions():
    class Args:
        reward_workers, reward_timeout, reward_retries = 0, None, 5
        reward_retry_on = ("TimeoutError", "json.JSONDecodeError")

    import json

    assert CallSettings.of(Args).retries == Retries((TimeoutError, json.JSONDecodeError), 5)
    for name in ("TimeoutErorr", "no_such_module.Error", "json.dumps", "KeyboardInterrupt"):
        Args.reward_retry_on = [name]
        with pytest.raises(ValueError, match=f"`reward_retry_on` has '{name}', which is not the name of an exception"):
            CallSettings.of(Args)


SCRIPT = """
from transformers import TrainerState
from es_trainer.rewards.caller import CallSettings
from es_trainer.rewards.scorer import Scorer

number = {number}

def reward(completions, **kwargs):
    print("scoring\\n", end="", flush=True)  # with its end, as another process writes at the same time
    while number is None:
        pass
    return [number]

scorer = Scorer(reward, calls=CallSettings(2))
print(scorer([{{"prompt": "p"}}] * 2, ["a", "b"], [[1], [1]], TrainerState()).total.tolist(), flush=True)
"""


def run_script(tmp_path, number):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(number=number))
    return subprocess.Popen([sys.executable, path], cwd=tmp_path, text=True, stdout=subprocess.PIPE)


def test_a_script_needs_no_guard(tmp_path):
    """The main file is not imported by the processes, which get functions that are defined there."""
    script = run_script(tmp_path, number=2.0)
    out, _ = script.communicate(timeout=300)
    assert sorted(out.splitlines()) == ["[2.0, 2.0]", "scoring", "scoring"]
    assert script.returncode == 0


def test_workers_end_with_their_scorer():
    scorer = Scorer(number_of_completions, calls=CallSettings(2))
    scores = scorer(ROWS, COMPLETIONS, [[1]] * 4, TrainerState())
    processes = [psutil.Process(pid) for pid in set(scores.extra["process"])]
    del scorer
    gc.collect()
    _, left = psutil.wait_procs(processes, timeout=20)
    assert not left


def test_nothing_is_left_of_a_program_that_was_killed(tmp_path):
    script = run_script(tmp_path, number=None)
    assert [script.stdout.readline(), script.stdout.readline()] == ["scoring\n"] * 2
    children = psutil.Process(script.pid).children(recursive=True)
    assert len(children) >= 4  # the server, the fork server and two workers
    script.send_signal(signal.SIGKILL)
    script.wait()
    _, left = psutil.wait_procs(children, timeout=20)
    for process in left:
        process.kill()
    assert not left
