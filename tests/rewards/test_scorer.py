import functools
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerState

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


@pytest.mark.parametrize("rewards", [np.array([1, 2]), torch.tensor([1.0, 2.0]), (True, np.float32(2.0))])
def test_any_kind_of_number_will_do(rewards):
    np.testing.assert_allclose(score(lambda **kwargs: rewards).total, [1.0, 2.0])


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0], "'bad' returned 1 rewards for 2 completions"),
        ([1.0, "2.0"], "'bad' returned '2.0' for completion 1"),
        ([math.nan, 1.0], "'bad' returned nan for completion 0"),
        ([1.0, math.inf], "'bad' returned inf for completion 1"),
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


def test_names():
    class Judge:
        def __call__(self, **kwargs):
            return [0.0, 0.0]

    def reward(scale=1, **kwargs):
        return [0.0, 0.0]

    assert Scorer([reward, functools.partial(reward, scale=2), Judge()]).names == ["reward", "reward_2", "Judge"]


@pytest.mark.parametrize("function", [3, None, nn.Linear(1, 1)])
def test_what_is_no_function_is_refused(function):
    with pytest.raises(TypeError, match="reward_funcs"):
        Scorer([function])


def test_wrong_number_of_weights():
    def reward(**kwargs):
        return []

    with pytest.raises(ValueError, match="`reward_weights` has 2 entries for 1 reward functions"):
        Scorer(reward, [1.0, 2.0])
    with pytest.raises(ValueError, match="empty"):
        Scorer([])


def test_extra_columns_have_a_value_for_each_completion():
    def reward(completions, log_extra, **kwargs):
        log_extra("note", ["a"])
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"`log_extra\('note', ...\)` 1 values for 2 completions"):
        score(reward)
