import sys
from typing import get_args

import numpy as np
import pytest
import scipy.stats

from es_trainer.evolution.fitness import (
    FitnessShaping,
    deviation,
    fitness,
    mean,
    normalized_sum,
    total_reward,
    utilities,
)


NAN = float("nan")
LARGEST = sys.float_info.max

SHAPINGS = get_args(FitnessShaping)
# Those in which a reward counts the same, whatever prompt it is for
LINEAR = [shaping for shaping in SHAPINGS if shaping != "prompt_z_score"]

every_shaping = pytest.mark.parametrize("shaping", SHAPINGS)
every_linear_shaping = pytest.mark.parametrize("shaping", LINEAR)


def populations(count: int = 30):
    """Rewards of random populations: of few levels, so that there are ties, and with some that do not count."""
    for seed in range(count):
        random = np.random.default_rng(seed)
        members, prompts = random.integers(2, 9, size=2)
        rewards = random.choice([0.0, 0.1, 1.0, 1.1], size=(members, prompts)) * random.choice([1e-9, 1.0, 1e9])
        rewards[random.random(rewards.shape) < random.choice([0.0, 0.2, 0.5])] = NAN
        yield random, rewards


# ---- each shaping ----


def test_z_score():
    rewards = np.array([[1.0, 3.0], [4.0, 6.0], [0.0, 1.0]])
    np.testing.assert_allclose(utilities(rewards, "z_score"), scipy.stats.zscore([2.0, 5.0, 0.5]))


def test_centered_rank_is_symmetric_and_shares_ties():
    np.testing.assert_allclose(utilities(np.array([10.0, -1000.0, 3.0]), "centered_rank"), [0.5, -0.5, 0.0])
    np.testing.assert_allclose(
        utilities(np.array([1.0, 7.0, 7.0, 2.0]), "centered_rank"), [-0.5, 1 / 3, 1 / 3, -1 / 6]
    )
    np.testing.assert_allclose(utilities(np.array([1.0, NAN, 2.0]), "centered_rank"), [-0.5, 0.0, 0.5])


def test_prompt_z_score_weighs_prompts_alike():
    easy_and_hard = np.array([[0.0, 0.001], [100.0, 0.0], [50.0, 0.002]])
    expected = np.mean([scipy.stats.zscore(column) for column in easy_and_hard.T], axis=0)
    np.testing.assert_allclose(utilities(easy_and_hard, "prompt_z_score"), expected)


def test_prompt_centered_divides_by_one_deviation_of_all():
    rewards = np.array([[0.0, 1000.0], [100.0, 1001.0], [50.0, 1002.0]])
    centered = np.array([[-50.0, -1.0], [50.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(utilities(rewards, "prompt_centered"), centered.mean(axis=1) / centered.std())
    one_prompt = np.array([3.0, 1.0, -2.0])
    np.testing.assert_allclose(utilities(one_prompt, "prompt_centered"), scipy.stats.zscore(one_prompt))


def test_none_has_a_baseline():
    np.testing.assert_allclose(utilities(np.array([101.0, 99.0, 100.0, 100.0]), "none"), [1.0, -1.0, 0.0, 0.0])


def test_unknown_shaping():
    with pytest.raises(ValueError, match="fitness_shaping='rank'.*centered_rank"):
        utilities(np.array([1.0, 2.0]), "rank")


# ---- rewards that do not count ----


@every_shaping
def test_a_member_that_lost_a_hard_prompt_is_not_better(shaping):
    assert not utilities(np.array([[1.0, NAN], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), shaping).any()


@every_shaping
def test_masking_leaves_equal_members_equal(shaping):
    for seed in range(30):
        random = np.random.default_rng(seed)
        difficulty = random.normal(size=7) * 10.0 ** random.integers(0, 7, size=7)
        rewards = np.tile(difficulty, (6, 1))
        rewards[random.random(rewards.shape) < 0.3] = NAN
        assert not utilities(rewards, shaping).any()


@every_shaping
def test_masking_hides_little_of_how_good_members_are(shaping):
    correlations = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        quality, difficulty = random.normal(size=30), 5 * random.normal(size=8)
        rewards = quality[:, None] + difficulty + 0.5 * random.normal(size=(30, 8))
        rewards[random.random(rewards.shape) < 0.2] = NAN
        correlations.append(np.corrcoef(utilities(rewards, shaping), quality)[0, 1])
    assert np.mean(correlations) > 0.9


def test_fitness_is_the_mean_less_how_easy_its_prompts_were():
    # Prompts have means of 1.5 and 4.5: the first is 1.5 easier than both together, the second is 1.5 harder
    rewards = np.array([[1.0, NAN], [2.0, 4.0], [NAN, 5.0]])
    np.testing.assert_allclose(fitness(rewards), [1.0 + 1.5, 3.0, 5.0 - 1.5])
    np.testing.assert_allclose(utilities(rewards, "none"), [-0.5, 0.0, 0.5])


@every_shaping
def test_a_member_with_less_than_half_of_the_prompts_counts_nothing(shaping):
    rewards = np.array([[1.0, 5.0, 2.0], [0.0, 6.0, 4.0], [2.0, NAN, 3.0], [99.0, NAN, NAN]])
    values = utilities(rewards, shaping)
    assert values[3] == 0.0 and values[:3].any()
    np.testing.assert_array_equal(values[:3], utilities(rewards[:3], shaping))


@every_shaping
def test_a_prompt_without_rewards_is_none(shaping):
    rewards = np.array([[1.0, NAN, NAN, NAN], [3.0, NAN, NAN, NAN]])
    np.testing.assert_array_equal(utilities(rewards, shaping), utilities(rewards[:, 0], shaping))


def test_a_member_without_rewards_takes_part_in_nothing():
    np.testing.assert_allclose(utilities(np.array([1.0, NAN, 3.0]), "z_score"), [-1.0, 0.0, 1.0])


# ---- ties ----


@every_shaping
@pytest.mark.parametrize("reward", [0.1, -7.3, 0.0, 1e300, LARGEST, 5e-324, NAN])
def test_equal_fitness_gives_no_update(shaping, reward):
    # 0.1 * 7 / 7 is not 0.1: equal values must not become z-scores of one by rounding
    with np.errstate(all="raise", under="ignore"):
        assert not utilities(np.full((7, 3), reward), shaping).any()


@every_linear_shaping
def test_rewards_in_another_order_are_as_good(shaping):
    rewards = np.array([[1.1, 0.1, 0.1], [0.1, 0.1, 1.1], [0.1, 1.1, 0.1], [1.1, 0.1, 0.1]])
    assert not utilities(rewards, shaping).any()


@every_linear_shaping
def test_members_with_equal_totals_have_equal_utilities(shaping):
    for seed in range(50):
        random = np.random.default_rng(seed)
        tenths = random.choice([0, 1, 10, 11], size=(30, 20))
        rewards = 0.1 * (tenths % 10) + tenths // 10  # a format and an answer reward: 1.1 is rounded
        values = utilities(rewards, shaping)
        totals = tenths.sum(axis=1)
        for one in range(30):
            np.testing.assert_array_equal(values == values[one], totals == totals[one])
        assert (np.argsort(np.unique(values)) == np.arange(len(np.unique(totals)))).all()


@every_linear_shaping
def test_ties_of_members_that_lack_a_prompt_of_large_rewards(shaping):
    for seed in range(400):
        a, b, c = np.random.default_rng(seed).random(3)
        values = utilities(np.array([[a, b + c, NAN], [a + b, c, NAN], [0.0, 0.4, 100.0]]), shaping)
        assert values[0] == values[1]


def test_equal_rewards_of_a_prompt_are_none_of_its_z_scores():
    sums = np.array([[0.1 + 0.2, 1.0], [0.3, 2.0]])  # which differ in the last bit
    np.testing.assert_array_equal(utilities(sums, "prompt_z_score"), [-0.5, 0.5])
    # Z-scores of 1.22, 0, -1.22, which are a thousand times less exact in the first column
    opposite = np.array([[1000.3, 0.1], [1000.2, 0.2], [1000.1, 0.3]])
    assert not utilities(opposite, "prompt_z_score").any()


def test_small_differences_count():
    values = utilities(np.array([[1e6, 1.0], [1e6 + 1e-6, 1.0], [1e6, 1.0 + 1e-6]]), "centered_rank")
    np.testing.assert_allclose(values, [-0.5, 0.25, 0.25])


# ---- what the mathematics says of any rewards ----


@every_shaping
def test_members_and_prompts_have_no_order(shaping):
    for random, rewards in populations():
        members, prompts = random.permutation(rewards.shape[0]), random.permutation(rewards.shape[1])
        values = utilities(rewards, shaping)
        np.testing.assert_array_equal(utilities(rewards[members], shaping), values[members])
        np.testing.assert_array_equal(utilities(rewards[:, prompts], shaping), values)


@every_shaping
def test_how_easy_prompts_are_does_not_matter(shaping):
    for random, rewards in populations():
        easier = rewards + np.nanmax(np.abs(rewards), initial=0.0) * random.normal(size=rewards.shape[1])
        values = utilities(rewards, shaping)
        np.testing.assert_allclose(utilities(easier, shaping), values, rtol=1e-9, atol=1e-9 * abs(values).max())


@every_shaping
@pytest.mark.parametrize("factor", [3.7, 1e-200, 1e200])
def test_the_unit_of_rewards_does_not_matter(shaping, factor):
    for _, rewards in populations():
        expected = utilities(rewards, shaping) * (factor if shaping == "none" else 1.0)
        np.testing.assert_allclose(utilities(factor * rewards, shaping), expected, rtol=1e-9, atol=0.0)


@every_shaping
def test_where_all_rewards_count_utilities_add_up_to_nothing(shaping):
    for random, rewards in populations():
        values = utilities(np.where(np.isnan(rewards), random.normal(size=rewards.shape), rewards), shaping)
        assert abs(values.sum()) < 1e-9 * max(abs(values).max(), 1.0)


@every_linear_shaping
def test_a_better_reward_makes_no_member_worse(shaping):
    for random, rewards in populations():
        complete = np.nan_to_num(rewards, nan=0.0)
        member, prompt = (random.integers(size) for size in complete.shape)
        better = complete.copy()
        better[member, prompt] += max(complete.max(), 1e-9)
        before, after = (scipy.stats.rankdata(utilities(values, shaping))[member] for values in (complete, better))
        assert after >= before


# ---- the largest numbers ----


@every_linear_shaping
def test_a_penalty_of_the_largest_float(shaping):
    values = utilities(np.array([[1.0, 3.0], [-LARGEST, 2.0], [2.0, 1.0], [-LARGEST, 5.0]]), shaping)
    assert np.isfinite(values).all()
    assert values[0] >= values[2] > 0 > values[1] and values[1] == values[3]


def test_ranks_tell_apart_what_an_outlier_is_far_from():
    rewards = np.array([[1.0, 3.0], [2.0, 2.5], [-LARGEST, LARGEST / 2], [2.0, 1.0]])
    np.testing.assert_allclose(utilities(rewards, "centered_rank"), [1 / 6, 0.5, -0.5, -1 / 6])


def test_infinite_rewards_are_refused():
    with pytest.raises(ValueError, match="must be finite.*inf"):
        utilities(np.array([1.0, -np.inf]), "z_score")


def test_means_and_deviations_do_not_overflow():
    values = np.array([-LARGEST, LARGEST, NAN, LARGEST, -LARGEST])
    assert mean(values) == 0.0 and deviation(values) == LARGEST
    assert mean(np.full((2, 3), LARGEST), axis=1).tolist() == [LARGEST] * 2
    assert np.isnan(mean(np.array([np.inf, -np.inf]))) and mean(np.array([np.inf, 1.0])) == np.inf
    assert not np.isfinite(deviation(np.array([np.inf, 1.0])))


def test_total_reward_sums_what_applies():
    rewards = np.array([[1.0, 2.0], [NAN, 3.0], [NAN, NAN]])
    np.testing.assert_allclose(total_reward(rewards, np.array([10.0, 1.0])), [12.0, 3.0, NAN])


@pytest.mark.parametrize("weights", [[1.0, 1.0], [2.0, -2.0]])
def test_a_total_that_no_float_can_hold_is_refused(weights):
    rewards = np.array([[1.0, 2.0], [LARGEST, LARGEST]])
    with pytest.raises(ValueError, match="rewards of completion 1 .*1.79.*reward_weights"):
        total_reward(rewards, np.array(weights))


# ---- several rewards on one scale ----


def test_rewards_of_any_range_count_the_same():
    rng = np.random.default_rng(0)
    narrow, wide = rng.normal(size=(2, 6, 4))
    same = normalized_sum(np.array([narrow, 1000 * wide + 7]), np.array([1.0, 1.0]))
    np.testing.assert_allclose(same, normalized_sum(np.array([narrow, wide]), np.array([1.0, 1.0])))
    for weights in ([1.0, 0.0], [0.0, 1.0]):
        values = fitness(normalized_sum(np.array([narrow, 1000 * wide + 7]), np.array(weights)))
        assert values.mean() == pytest.approx(0.0) and values.std() == pytest.approx(1.0)


def test_z_scores_are_weighed_and_added():
    first, second = np.array([[1.0], [2.0], [6.0]]), np.array([[0.0], [10.0], [5.0]])
    deviations = np.sqrt(14 / 3), np.sqrt(50 / 3)  # of 1, 2, 6 from 3, and of 0, 10, 5 from 5
    expected = 2.0 * np.array([-2, -1, 3]) / deviations[0] - 1.0 * np.array([-5, 5, 0]) / deviations[1]
    found = normalized_sum(np.array([first, second]), np.array([2.0, -1.0]))
    np.testing.assert_allclose(found[:, 0], expected)


def test_a_reward_that_tells_nobody_apart_counts_nothing():
    rewards = np.array([[1.0, 2.0], [3.0, 1.0], [2.0, 9.0]])
    constant = np.full_like(rewards, 0.1 + 0.2)
    alone = normalized_sum(np.array([rewards]), np.array([1.0]))
    np.testing.assert_allclose(normalized_sum(np.array([rewards, constant]), np.array([1.0, 5.0])), alone)


def test_where_no_reward_applies_nothing_is_known():
    first = np.array([[1.0, NAN], [2.0, NAN], [4.0, NAN]])
    second = np.array([[NAN, 1.0], [NAN, NAN], [NAN, 3.0]])
    found = normalized_sum(np.array([first, second]), np.array([1.0, 1.0]))
    assert np.isnan(found).tolist() == [[False, False], [False, True], [False, False]]


# ---- prompts of members' own ----

SHAPINGS_OF_PAIRS = ("z_score", "centered_rank", "prompt_centered", "none")


def own_rewards(seed: int = 0, members: int = 8, prompts: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 8, size=(members, prompts)) / 8


def test_pairs_are_compared_by_half_of_their_differences():
    rewards = own_rewards()
    half = (rewards[::2] - rewards[1::2]).mean(axis=1) / 2
    values = np.stack([half, -half], axis=1).ravel()
    np.testing.assert_allclose(fitness(rewards, 2), rewards.mean() + values)
    np.testing.assert_allclose(utilities(rewards, "none", 2), values)
    np.testing.assert_allclose(utilities(rewards, "z_score", 2), values / np.sqrt(np.mean(values**2)))
    np.testing.assert_allclose(
        utilities(rewards, "centered_rank", 2), (scipy.stats.rankdata(values) - 1) / 7 - 0.5, atol=1e-15
    )
    of_prompts = (rewards[::2] - rewards[1::2]) / 2
    np.testing.assert_allclose(utilities(rewards, "prompt_centered", 2), values / np.sqrt(np.mean(of_prompts**2)))


@pytest.mark.parametrize("shaping", SHAPINGS_OF_PAIRS)
def test_luck_with_easy_prompts_moves_no_pair(shaping):
    rewards = own_rewards()
    ease = np.repeat(np.random.default_rng(1).integers(-64, 64, size=(4, 3)), 2, axis=0)
    found = utilities(rewards, shaping, 2)
    assert np.array_equal(utilities(rewards + ease, shaping, 2), found) and found.any()
    np.testing.assert_allclose(found[::2], -found[1::2], atol=1e-15)
    assert not np.allclose(utilities(rewards + ease, "z_score", 1), utilities(rewards, "z_score", 1))


def test_a_pair_of_which_one_does_not_count_is_not_compared_there():
    rewards = own_rewards()
    found = rewards.copy()
    found[2, 0] = np.nan
    without = rewards[2:4, 1:]
    half = (without[0] - without[1]).mean() / 2
    expected = utilities(rewards, "none", 2)
    expected[2:4] = half, -half
    np.testing.assert_allclose(utilities(found, "none", 2), expected)
    found[2:4] = [[np.nan, 1.0, np.nan], [0.0, 5.0, 2.0]]  # less than half
    expected[2:4] = 0.0
    np.testing.assert_allclose(utilities(found, "none", 2), expected)
    assert np.isnan(fitness(found, 2)[2:4]).all()


def test_members_alone_have_the_mean_of_what_counts():
    rewards = own_rewards()
    rewards[0, 1] = rewards[3, :2] = np.nan
    values = np.nanmean(rewards, axis=1)
    values[3] = np.nan  # less than half
    np.testing.assert_allclose(fitness(rewards, 1), values)
    scores = (values - np.nanmean(values)) / np.nanstd(values)
    np.testing.assert_allclose(utilities(rewards, "z_score", 1), np.nan_to_num(scores))


@pytest.mark.parametrize("shaping", SHAPINGS_OF_PAIRS)
def test_pairs_that_differ_by_rounding_are_equal(shaping):
    rewards = np.array([[0.1 + 0.2, 1.0], [0.3, 1.0], [0.7, 1e-3], [0.8 - 0.1, 1e-3]])
    assert rewards[0, 0] != rewards[1, 0] and rewards[2, 0] != rewards[3, 0]
    assert not utilities(rewards, shaping, 2).any()
    assert np.unique(fitness(rewards, 2)).size == 1


@pytest.mark.parametrize(
    ("shaping", "together"), [("prompt_z_score", 2), ("prompt_z_score", 1), ("prompt_centered", 1)]
)
def test_what_compares_members_on_prompts_needs_members_that_have_the_same(shaping, together):
    with pytest.raises(ValueError, match=f"fitness_shaping='{shaping}' is not valid: it compares"):
        utilities(own_rewards(), shaping, together)


@pytest.mark.parametrize("together", [1, 2])
def test_several_rewards_of_own_prompts_are_brought_to_one_scale(together):
    narrow, wide = own_rewards(1), own_rewards(2)
    narrow[2, 1] = np.nan  # where only the other one applies
    values = [fitness(narrow, together), fitness(wide, together)]
    total = normalized_sum(np.array([narrow, 1000 * wide + 7]), np.array([2.0, 1.0]), together)
    assert not np.isnan(total).any()
    if together == 2:
        centered = [(rewards[::2] - rewards[1::2]) / 2 for rewards in (narrow, wide)]
        expected = 2 * np.nan_to_num(centered[0]) / np.std(values[0]) + centered[1] / np.std(values[1])
        np.testing.assert_allclose(total[::2], expected)
        np.testing.assert_allclose(total[1::2], -expected)
    else:
        centered = [np.nan_to_num(rewards - np.nanmean(rewards)) for rewards in (narrow, wide)]
        np.testing.assert_allclose(total, 2 * centered[0] / np.std(values[0]) + centered[1] / np.std(values[1]))
