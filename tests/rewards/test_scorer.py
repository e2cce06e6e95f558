import asyncio
import functools
import math
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerState
from trl.rewards import get_soft_overlong_punishment

from es_trainer.rewards import caller
from es_trainer.rewards.scorer import Scorer


ROWS = [{"prompt": "a", "answer": "x", "level": 1}, {"prompt": "b", "answer": "y", "level": 2}]


def score(functions, weights=None):
    return Scorer(functions, weights)(ROWS, ["c", "d"], [[1], [2, 3]], TrainerState())


def test_functions_get_what_grpo_gives_them():
    seen = {}

    def reward(**kwargs):
        seen.update(kwargs)
        return [0.0, 0.0]

    score(reward)
    assert seen["prompts"] == ["a", "b"]
    assert seen["completions"] == ["c", "d"]
    assert seen["completion_ids"] == [[1], [2, 3]]
    assert seen["answer"] == ["x", "y"]
    assert seen["level"] == [1, 2]
    assert isinstance(seen["trainer_state"], TrainerState)
    assert "prompt" not in seen


def test_functions_can_log():
    def reward(completions, log_extra, log_metric, **kwargs):
        log_extra("note", ["good", "bad"])
        log_metric("share", 0.25)
        return [1.0, 2.0]

    scores = score(reward)
    assert scores.extra == {"note": ["good", "bad"]}
    assert scores.metrics == {"share": [0.25]}


def test_weighted_sum_of_what_applies():
    def first(completions, **kwargs):
        return [1.0, None]

    def second(completions, **kwargs):
        return [10, 20]

    scores = score([first, second], [2.0, 0.5])
    np.testing.assert_allclose(scores.total, [7.0, 10.0])
    np.testing.assert_allclose(scores.by_function, [[1.0, 10.0], [math.nan, 20.0]])


@pytest.mark.parametrize(
    "rewards",
    [
        np.array([1, 2]),
        torch.tensor([1.0, 2.0]),
        (True, np.float32(2.0)),
        [np.bool_(True), Decimal("2.0")],
        [Fraction(2, 2), torch.tensor([2], dtype=torch.bfloat16)],
        [torch.tensor(True), np.array([[2]])],
        (float(number) for number in (1, 2)),
    ],
)
def test_any_kind_of_number_will_do(rewards):
    np.testing.assert_allclose(score(lambda **kwargs: rewards).total, [1.0, 2.0])


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0], "'bad' returned 1 rewards for 2 completions"),
        ([1.0, "2.0"], "'bad' returned '2.0' for completion 1"),
        ([math.nan, 1.0], "'bad' returned nan for completion 0"),
        ([1.0, math.inf], "'bad' returned inf for completion 1"),
        ([1.0, Decimal("NaN")], r"'bad' returned Decimal\('NaN'\) for completion 1"),
        ([1.0, Decimal("1e400")], r"'bad' returned Decimal\('1E\+400'\) for completion 1"),
        ([1.0, 10**400], "'bad' returned an integer of 1329 bits for completion 1"),
        ([1.0, 1j], "'bad' returned 1j for completion 1"),
        ({0: 1.0, 1: 2.0}, "'bad' returned {0: 1.0, 1: 2.0} instead of a list of 2 numbers"),
        ("12", "'bad' returned '12' instead of a list of 2 numbers"),
        ([1.0, torch.tensor([1.0, 2.0])], "'bad' returned tensor"),
        (3.0, "'bad' returned 3.0 instead of a list of 2 numbers"),
        (None, "'bad' returned None instead of a list"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(rewards, message):
    def good(**kwargs):
        return [0.0, 0.0]

    def bad(**kwargs):
        return rewards

    with pytest.raises(ValueError, match=message):
        score([good, bad])


def test_a_function_that_raises_is_named():
    def fragile(**kwargs):
        raise KeyError("solution")

    with pytest.raises(RuntimeError, match="'fragile' raised KeyError: 'solution'") as error:
        score(fragile)
    assert isinstance(error.value.__cause__, KeyError)


def test_a_sum_that_no_float_can_be_is_named():
    def penalty(**kwargs):
        return [0.0, -sys.float_info.max]

    np.testing.assert_array_equal(score(penalty).total, [0.0, -sys.float_info.max])
    with pytest.raises(ValueError, match="penalty, penalty_2: .* of completion 1 "):
        score([penalty, penalty])


def exits(**kwargs):
    sys.exit(3)


def test_a_function_that_exits_is_named():
    with pytest.raises(RuntimeError, match="'exits' raised SystemExit: 3") as error:
        score(exits)
    assert isinstance(error.value.__cause__, SystemExit)


def test_a_keyboard_interrupt_stays_one():
    def interrupted(**kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted)


def test_rewards_that_fail_when_they_are_looked_at_are_named():
    def lazy(completions, **kwargs):
        return map(float, completions)

    with pytest.raises(RuntimeError, match="'lazy' raised ValueError: could not convert"):
        score(lazy)


async def exits_later(**kwargs):
    await asyncio.sleep(0)
    sys.exit(3)


async def has_a_task_that_exits(**kwargs):
    await asyncio.gather(exits_later())


async def cancels_itself(**kwargs):
    raise asyncio.CancelledError("no time")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (exits_later, "'exits_later' raised SystemExit: 3"),
        (has_a_task_that_exits, "'has_a_task_that_exits' raised SystemExit: 3"),
        (cancels_itself, "'cancels_itself' raised CancelledError: no time"),
    ],
)
def test_an_async_function_that_exits_is_named_and_ends_nothing_else(function, message):
    cancelled = threading.Event()

    async def waits(fails, **kwargs):
        try:
            await asyncio.sleep(3600 if fails[0] else 0)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [1.0, 2.0]

    async def may_fail(fails, **kwargs):
        return await function() if fails[0] else [0.0, 0.0]

    may_fail.__name__ = function.__name__
    scorer = Scorer([waits, may_fail])

    def run(fails):
        return scorer([{**row, "fails": fails} for row in ROWS], ["c", "d"], [[1], [2, 3]], TrainerState())

    with pytest.raises(RuntimeError, match=message):
        run(True)
    assert cancelled.wait(10), "what ran beside it goes on"
    np.testing.assert_array_equal(run(False).total, [1.0, 2.0])


def test_functions_that_take_long_are_named_at_growing_times(caplog, monkeypatch):
    monkeypatch.setattr(caller, "PATIENCE", 0.1)

    def slow(**kwargs):
        time.sleep(0.55)
        return [0.0, 0.0]

    async def slow_judge(**kwargs):
        await asyncio.sleep(0.3)
        return [0.0, 0.0]

    def fast(**kwargs):
        return [0.0, 0.0]

    scorer = Scorer([slow, slow_judge, fast])
    with caplog.at_level("WARNING"):
        for _ in range(2):  # as slow as last time is nothing new
            scorer(ROWS, ["c", "d"], [[1], [2, 3]], TrainerState())
    assert caplog.text.count("'slow' has been running for") == 3  # 0.1, 0.2 and 0.4 seconds
    assert caplog.text.count("'slow_judge' has been running for") == 2
    assert "'fast'" not in caplog.text


def test_every_call_has_rows_of_its_own():
    """Functions, and calls of them, see nothing of what others change; images and the like are not copied."""
    image = np.zeros(3)
    rows = [
        {"prompt": [{"role": "user", "content": "hi"}], "refs": ["a", "b"], "info": {"tags": ({"t"},)}, "image": image}
        for _ in range(2)
    ]
    completions, ids = [[{"role": "assistant", "content": "x"}] for _ in rows], [[1], [2, 3]]
    seen = []

    def changes(prompts, completions, completion_ids, refs, info, image, **kwargs):
        seen.append((len(prompts[0]), completions[0][0]["content"], completion_ids[1][:], refs[0][:], len(info[0])))
        seen[-1] += (info[0]["tags"][0].copy(), image[0])
        prompts[0].append(completions[0].pop())
        completion_ids[1].clear()
        refs[0].pop()
        info[0]["tags"][0].add("u")
        info[0]["more"] = 1
        refs.clear()
        return [0.0, 0.0]

    async def changes_too(**kwargs):
        return changes(**kwargs)

    scorer = Scorer([changes, changes_too, changes])
    for _ in range(2):
        scorer(rows, completions, ids, TrainerState())
    assert len(seen) == 6
    for length, content, ids_seen, refs, fields, tags, picture in seen:
        assert (length, content, ids_seen, refs, fields, tags) == (1, "x", [2, 3], ["a", "b"], 1, {"t"})
        assert picture is image


def test_async_functions_of_one_call_at_a_time_run_in_the_order_of_the_calls():
    running: list[str] = []

    async def judge(completions, **kwargs):
        running.append(completions[0])
        await asyncio.sleep(0.05)
        running.append(completions[0])
        return [1.0]

    scorer = Scorer(judge)
    texts = ["a", "b", "c"]
    finish = [scorer.begin(ROWS[:1], [text], [[1]], TrainerState()) for text in texts]
    for end in reversed(finish):
        end()
    assert running == [text for text in texts for _ in range(2)]


def test_time_in_which_functions_run_together_counts_once():
    async def judge(**kwargs):
        await asyncio.sleep(1.0)
        return [0.0, 0.0]

    def blocking(**kwargs):
        time.sleep(1.0)
        return [0.0, 0.0]

    assert 1.0 <= score([judge, blocking]).seconds < 1.9
    assert 1.0 <= score([judge, judge]).seconds < 1.9


def test_columns_and_rewards_of_the_same_name():
    def first(completions, log_extra, log_metric, **kwargs):
        log_extra("parsed", [1, 2])
        log_metric("share", 0.5)
        return [0.0, 0.0]

    def second(completions, log_extra, log_metric, **kwargs):
        log_extra("parsed", [3, 4])
        log_metric("share", 1.5)
        return [0.0, 0.0]

    scores = score([first, second])
    assert scores.extra == {"parsed": [1, 2], "parsed_2": [3, 4]}
    assert scores.metrics == {"share": [0.5, 1.5]}
    second.__name__ = "first_2"
    assert Scorer([first, second, first]).names == ["first", "first_2", "first_3"]


def test_names():
    class Judge:
        def __call__(self, **kwargs):
            return [0.0, 0.0]

    class Named(Judge):
        __name__ = "named_reward"

    def reward(scale=1, **kwargs):
        return [0.0, 0.0]

    functions = [reward, functools.partial(reward, scale=2), Judge(), Named(), get_soft_overlong_punishment(20, 4)]
    names = ["reward", "reward_2", "Judge", "named_reward", "soft_overlong_punishment_reward"]
    assert Scorer(functions).names == names


@pytest.mark.parametrize("function", [3, nn.Linear(1, 1), [None]])
def test_what_is_no_function_is_refused(function):
    with pytest.raises(TypeError, match="reward_funcs"):
        Scorer([function])


def test_wrong_number_of_weights():
    def reward(**kwargs):
        return []

    with pytest.raises(ValueError, match="`reward_weights` has 2 entries for 1 reward functions"):
        Scorer(reward, [1.0, 2.0])
    for nothing in (None, []):
        with pytest.raises(ValueError, match="`reward_funcs=.* no reward"):
            Scorer(nothing)


def test_extra_columns_have_a_value_for_each_completion():
    def reward(completions, log_extra, **kwargs):
        log_extra("note", ["a"])
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"`log_extra\('note', ...\)` 1 values for 2 completions"):
        score(reward)
