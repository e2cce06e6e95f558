import numpy as np
import pytest
import scipy.stats

from es_trainer.evolution.fitness import total_reward, utilities


NAN = float("nan")


def test_z_score():
    rewards = np.array([[1.0, 3.0], [4.0, 6.0], [0.0, 1.0]])
    np.testing.assert_allclose(utilities(rewards, "z_score"), scipy.stats.zscore([2.0, 5.0, 0.5]))


def test_z_score_leaves_out_members_without_rewards():
    values = utilities(np.array([1.0, NAN, 3.0]), "z_score")
    np.testing.assert_allclose(values, [-1.0, 0.0, 1.0])


def test_a_member_is_judged_by_the_prompts_that_count():
    values = utilities(np.array([[1.0, NAN], [2.0, 4.0], [NAN, 5.0]]), "none")
    np.testing.assert_allclose(values, [1.0, 3.0, 5.0])


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


@pytest.mark.parametrize("shaping", ["z_score", "centered_rank", "prompt_z_score", "none"])
@pytest.mark.parametrize("reward", [0.1, -7.3, 0.0, 1e300, NAN])
def test_equal_fitness_gives_no_update(shaping, reward):
    # 0.1 * 7 / 7 is not 0.1: equal values must not become z-scores of one by rounding
    with np.errstate(all="raise", under="ignore", over="ignore", invalid="ignore"):
        assert not utilities(np.full((7, 3), reward), shaping).any()


def test_unknown_shaping():
    with pytest.raises(ValueError, match="fitness_shaping='rank'.*centered_rank"):
        utilities(np.array([1.0, 2.0]), "rank")


def test_total_reward_sums_what_applies():
    rewards = np.array([[1.0, 2.0], [NAN, 3.0], [NAN, NAN]])
    np.testing.assert_allclose(total_reward(rewards, np.array([10.0, 1.0])), [12.0, 3.0, NAN])
