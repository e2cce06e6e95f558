"""Rewards of several completions of a prompt."""

import itertools
import math

import numpy as np
import pytest

from es_trainer.evolution.generations import elected, pass_at, prompt_rewards, tries


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("right", [0, 1, 2, 5])
def test_pass_at_k_is_unbiased(right, k):
    rewards = np.array([1.0] * right + [0.0] * (5 - right))
    assert pass_at(rewards, k) == pytest.approx(1 - math.comb(5 - right, k) / math.comb(5, k))


def test_of_other_rewards_it_is_the_mean_of_the_best_of_k():
    rewards = np.array([0.3, -1.0, 2.5, 0.3, 7.0])
    for k in range(1, 6):
        best = [max(chosen) for chosen in itertools.combinations(rewards, k)]
        assert pass_at(rewards, k) == pytest.approx(np.mean(best))


def test_what_does_not_count_is_not_drawn():
    assert pass_at(np.array([1.0, math.nan, 0.0]), 2) == 1.0
    assert math.isnan(pass_at(np.array([1.0, math.nan, 0.0]), 3))


REWARDS = np.array([[0.0, 1.0, 0.0, 0.5], [math.nan, math.nan, 0.25, 0.0], [math.nan] * 4])


@pytest.mark.parametrize(
    ("way", "expected"),
    [("mean", [0.375, 0.125, math.nan]), ("max", [1.0, 0.25, math.nan]), ("pass@2", [4 / 6, 0.25, math.nan])],
)
def test_rewards_of_prompts(way, expected):
    np.testing.assert_allclose(prompt_rewards(REWARDS, way), expected)


def test_the_majority_has_the_reward_of_the_answer_that_most_give():
    keys = [["a", "b", "a", "c"], ["a", "a", "b", "c"], ["a"] * 4]
    # Of the second prompt, the two that vote for "a" do not count
    np.testing.assert_allclose(prompt_rewards(REWARDS, "majority", keys), [0.0, 0.125, math.nan])


def test_several_answers_that_most_give_share_the_majority():
    assert prompt_rewards(np.array([[1.0, 0.0, 1.0, 0.0, 5.0]]), "majority", [["a", "b", "a", "b", "c"]]) == [0.5]


@pytest.mark.parametrize(
    ("keys", "expected"), [("a", 0), ("abb", 1), ("abbaa", 0), ("cbaab", 1), ("cbaaab", 2), ("abc", 0)]
)
def test_the_first_voter_for_the_answer_that_most_give(keys, expected):
    assert elected(keys) == expected


@pytest.mark.parametrize(("number", "expected"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_tries_of_interest(number, expected):
    assert tries(number) == expected
