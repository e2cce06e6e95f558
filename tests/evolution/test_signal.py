"""Analyses of variance whose answer is known."""

import math

import numpy as np
import pytest
import scipy.stats

from es_trainer.evolution.fitness import fitness
from es_trainer.evolution.signal import expected_gain, settled, signal


MEMBERS = np.array([3.0, 1.0, -1.0, -3.0])  # effects that add up to zero
PROMPTS = np.array([10.0, 0.0, -10.0])
ALTERNATING = np.outer([1.0, -1.0, -1.0, 1.0], [1.0, -2.0, 1.0])  # a residual: rows and columns add up to zero


def matrix(residual: float) -> np.ndarray:
    return MEMBERS[:, None] + PROMPTS + residual * ALTERNATING


@pytest.mark.parametrize("residual", [0.0, 0.5, 1.0, 2.0])
def test_reliability_is_one_minus_the_ratio_of_mean_squares(residual):
    members_square = 3 * (9 + 1 + 1 + 9) / 3  # prompts * sum of squares / degrees of freedom
    residual_square = residual**2 * (4 * 6) / (3 * 2)
    assert signal(matrix(residual)).reliability == pytest.approx(1 - residual_square / members_square)


def test_the_interval_is_that_of_the_f_distribution():
    reliability, low, high = signal(matrix(1.0))
    f = scipy.stats.f(3, 3 * 2)
    assert (low, high) == pytest.approx((1 - (1 - reliability) * f.ppf(0.975), 1 - (1 - reliability) * f.ppf(0.025)))


def test_neither_prompts_nor_units_matter():
    found = signal(matrix(1.0))
    assert signal(matrix(1.0) + [5.0, -100.0, 7.0]) == pytest.approx(found)
    assert signal(1e300 * matrix(1.0) / 100) == pytest.approx(found)
    assert signal(matrix(1.0)[:, ::-1]) == pytest.approx(found)


def test_the_interval_is_right_19_times_of_20():
    rng = np.random.default_rng(0)
    members, prompts, noise = 12, 5, 2.0
    # Fitness has the variance 1 + noise**2 / prompts, of which 1 is the members'
    true = 1 / (1 + noise**2 / prompts)
    found = [
        signal(rng.normal(size=(members, 1)) + rng.normal(size=prompts) + noise * rng.normal(size=(members, prompts)))
        for _ in range(2000)
    ]
    covered = np.mean([low <= true <= high for _, low, high in found])
    assert 0.935 < covered < 0.965
    # The ratio of two mean squares is inverse F: its mean is known
    degrees = members - 1
    assert np.mean([1 - each.reliability for each in found]) == pytest.approx(
        (1 - true) * degrees / (degrees - 2), rel=0.05
    )


def test_rewards_by_luck_have_no_signal():
    rng = np.random.default_rng(1)
    found = [signal(rng.normal(size=(30, 8))).reliability for _ in range(300)]
    assert abs(np.mean([1 - each for each in found]) - 29 / 27) < 0.03


def test_where_it_cannot_be_told():
    assert not signal(matrix(1.0)[:, :1]).is_known  # one prompt
    assert not signal(matrix(1.0)[:1]).is_known
    assert not signal(np.full((4, 3), 0.1 + 0.2)).is_known
    assert not signal(np.full((4, 3), math.nan)).is_known


def test_what_does_not_count_is_left_out():
    rewards = matrix(1.0)
    missing = np.hstack([rewards, [[1.0], [math.nan], [5.0], [5.0]]])
    assert signal(missing) == pytest.approx(signal(rewards))
    assert signal(np.vstack([rewards, np.full((1, 3), math.nan)])) == pytest.approx(signal(rewards))


def test_prompts_on_which_all_agree_are_settled():
    nan = math.nan
    rewards = np.array([[1.0, 0.1 + 0.2, nan, nan, 0.0], [1.0, 0.3, 1.0, nan, 1.0], [1.0, 0.3, 1.0, nan, 1.0]])
    assert settled(rewards).tolist() == [True, True, True, True, False]


def test_expected_gain_of_rewards_that_are_linear_in_the_weights():
    # A linear reward: member n gets slope @ noise_n * sigma. The update is lr / N * sum(utility * noise).
    rng = np.random.default_rng(2)
    sigma, learning_rate, members = 0.1, 0.02, 8
    noise, _ = np.linalg.qr(rng.normal(size=(50, members)))
    noise = noise.T  # orthonormal, so that members say nothing about each other
    noise -= noise.mean(axis=0)
    slope = rng.normal(size=50)
    rewards = np.repeat((noise @ slope * sigma)[:, None], 3, axis=1)
    utilities = rng.normal(size=members)
    by_utility = learning_rate / members * utilities * (noise @ slope)
    assert expected_gain(
        fitness(rewards), signal(rewards).reliability, utilities, learning_rate / sigma
    ) == pytest.approx(by_utility.sum())


def test_what_is_luck_is_not_expected_to_come_again():
    utilities = np.array([1.0, 0.5, 0.0, -2.0])
    expected = 0.2 * (3.0 + 0.5 + 6.0) / 4 * signal(matrix(2.0)).reliability
    assert expected_gain(fitness(matrix(2.0)), signal(matrix(2.0)).reliability, utilities, 0.2) == pytest.approx(
        expected
    )


# ---- prompts of members' own ----


def test_members_with_prompts_of_their_own_are_one_factor():
    rewards = np.random.default_rng(3).normal(size=(6, 4)) + np.arange(6.0)[:, None]
    f, _ = scipy.stats.f_oneway(*rewards)
    distribution = scipy.stats.f(5, 6 * 3)
    found = signal(rewards, members_per_prompt=1)
    assert found.reliability == pytest.approx(1 - 1 / f)
    assert (found.low, found.high) == pytest.approx((1 - distribution.ppf(0.975) / f, 1 - distribution.ppf(0.025) / f))
    rewards[0, 1:3] = rewards[4, 0] = math.nan
    f, _ = scipy.stats.f_oneway(*rewards, nan_policy="omit")
    assert signal(rewards, members_per_prompt=1).reliability == pytest.approx(1 - 1 / f)


def of_pairs(differences: np.ndarray, ease: np.ndarray) -> np.ndarray:
    return np.stack([ease + differences / 2, ease - differences / 2], axis=1).reshape(-1, differences.shape[1])


def test_pairs_are_analysed_by_their_differences_about_zero():
    differences = np.array([[3.0, 1.0], [-2.0, -4.0], [5.0, 5.0]])  # means 2, -3, 5; residuals 1 and -1, twice, and 0
    mean_square, residual_square = 2 * (4 + 9 + 25) / 3, (2 + 2 + 0) / 3
    for ease in (np.zeros((3, 2)), np.array([[100.0, -100.0], [7.0, 0.5], [0.0, 0.0]])):
        found = signal(of_pairs(differences, ease), members_per_prompt=2)
        assert found.reliability == pytest.approx(1 - residual_square / mean_square)
        f = scipy.stats.f(3, 3)
        assert found.low == pytest.approx(1 - residual_square / mean_square * f.ppf(0.975))
    # Which of a pair comes first does not matter, and neither do units
    swapped = of_pairs(differences * [[1], [-1], [1]], np.ones((3, 2)))
    assert signal(1e300 * swapped / 100, members_per_prompt=2).reliability == pytest.approx(found.reliability)


@pytest.mark.parametrize("members_per_prompt", [1, 2])
def test_their_intervals_are_right_19_times_of_20(members_per_prompt):
    rng = np.random.default_rng(0)
    prompts, noise, spread = 4, 2.0, 3.0  # of luck and, for pairs, of the prompts' ease
    # Fitness has the variance 1 + noise**2 / prompts, of which 1 is the members'
    true = 1 / (1 + noise**2 / prompts)
    covered, unreliable = [], []
    for _ in range(2000):
        values = rng.normal(size=(10, 1)) + noise * rng.normal(size=(10, prompts))
        if members_per_prompt == 2:
            values = of_pairs(values, spread * rng.normal(size=values.shape))
        reliability, low, high = signal(values, members_per_prompt)
        covered.append(low <= true <= high)
        unreliable.append(1 - reliability)
    assert 0.935 < np.mean(covered) < 0.965
    degrees = 10 if members_per_prompt == 2 else 9
    assert np.mean(unreliable) == pytest.approx((1 - true) * degrees / (degrees - 2), rel=0.05)


def test_where_theirs_cannot_be_told():
    nan = math.nan
    for together in (1, 2):
        assert not signal(matrix(1.0)[:, :1], together).is_known  # one prompt
        assert not signal(np.full((4, 3), nan), together).is_known
        assert not signal(matrix(1.0)[:together], together).is_known  # one member, or pair
    assert not signal(np.array([[0.1 + 0.2, 0.5]] * 2 + [[0.3, 0.5]] * 2), 2).is_known
    assert not signal(np.array([[0.1 + 0.2, 0.6], [0.3, 0.6]] * 2), 2).is_known  # equal but for rounding
    # A prompt that does not count for one of a pair says nothing of it
    rewards = of_pairs(np.array([[3.0, 1.0], [-2.0, -4.0]]), np.zeros((2, 2)))
    missing = np.hstack([rewards, [[nan], [50.0], [7.0], [nan]]])
    assert signal(missing, 2) == pytest.approx(signal(rewards, 2))


def test_prompts_on_which_a_pair_agrees_are_settled():
    nan = math.nan
    rewards = np.array([[1.0, 0.1 + 0.2, nan], [1.0, 0.3, 1.0], [1.0, 2.0, nan], [0.0, 2.0, nan]])
    assert settled(rewards, 2).tolist() == [True, True, True, False, True, True]
