import math
import sys

import numpy as np
import pytest

from es_trainer.run.metrics import Moments, Summary, average, completion_metrics


VALUES = np.array([1.0, 2.0, np.nan, 4.0, 1e6, 1e6 + 1, np.nan])


@pytest.mark.parametrize("cut", range(len(VALUES) + 1))
def test_moments_of_parts_are_those_of_the_whole(cut):
    moments = Moments.of_all([Moments.of(VALUES[:cut]), Moments.of(VALUES[cut:])])
    assert moments.count == 5
    assert moments.mean == pytest.approx(np.nanmean(VALUES), rel=1e-14)
    assert moments.deviation == pytest.approx(np.nanstd(VALUES), rel=1e-12)


def test_equal_values_do_not_deviate():
    assert Moments.of_all([Moments.of(np.full(3, 0.1)), Moments.of(np.full(4, 0.1))]).deviation < 1e-16


def test_nothing_has_no_mean():
    nothing = Moments.of_all([Moments.of(np.array([np.nan])), Moments.of(np.array([]))])
    assert nothing.count == 0 and math.isnan(nothing.mean) and math.isnan(nothing.deviation)


LARGEST = sys.float_info.max


@pytest.mark.parametrize(
    ("values", "mean", "deviation"),
    [
        ([-LARGEST, 0.0, LARGEST], 0.0, LARGEST * math.sqrt(2 / 3)),
        ([1e200, 0.0, -1e200], 0.0, 1e200 * math.sqrt(2 / 3)),
        ([-LARGEST] * 3, -LARGEST, 0.0),
    ],
)
def test_the_largest_numbers_do_not_overflow(values, mean, deviation):
    moments = Moments.of_all([Moments.of(np.array(values)), Moments.of(np.array(values[::-1]))])
    assert moments == (6, pytest.approx(mean), pytest.approx(deviation))


@pytest.mark.parametrize("values", [[math.inf, 1.0], [math.inf, -math.inf], [-math.inf, -math.inf]])
def test_infinite_numbers_have_no_finite_mean(values):
    parts = Moments.of_all([Moments.of(np.array(values)), *(Moments.of(np.array([value])) for value in values)])
    assert parts.count == 4 and not math.isfinite(parts.mean) and not math.isfinite(parts.deviation)


def test_averages_leave_out_what_is_unknown_and_do_not_overflow():
    steps = [{"reward": LARGEST, "std": None}, {"reward": None, "std": None}, {"reward": LARGEST, "own": 2.0}]
    assert average(steps) == {"reward": LARGEST, "std": None, "own": 2.0}
    assert average([{"distance_from_start": 1.0}, {"distance_from_start": None}]) == {"distance_from_start": 1.0}
    assert average([{"distance_from_start": None}]) == {"distance_from_start": None}


def summary(generated_by, seconds: float = 10.0, scored_by=0, tokens: int = 100) -> Summary:
    lengths = {"completions": 2, "truncated": 0, "shortest": 1, "longest": tokens, "ended": [tokens, 1, tokens]}
    who = {"generated_by": generated_by, "scored_by": scored_by}
    seconds = {"generation_seconds": seconds, "reward_seconds": 0.1 * seconds}
    return Summary([0.0], [], [], tokens=tokens, num_tokens=tokens, own={}, **lengths, **who, **seconds)


@pytest.mark.parametrize(
    ("summaries", "generation", "reward"),
    [
        # 8 members on 4 servers, all scored by one process
        ([summary(f"http://{member % 4}") for member in range(8)], 20.0, 8.0),
        # 8 members in 2 groups of processes, whose first ones, 0 and 2, score
        ([summary(2 * (member % 2), scored_by=2 * (member % 2)) for member in range(8)], 40.0, 4.0),
        # Of many processes, the third has taken the only batch of an evaluation
        ([summary(2, scored_by=2)], 10.0, 1.0),
        # 3 processes complete their share of every member's prompts at the same time; of the last, two have one
        ([summary(rank).share(3) for rank in range(3)] + [summary(rank).share(2) for rank in range(2)], 20.0, 2.0),
    ],
)
def test_seconds_are_divided_among_those_that_work_side_by_side(summaries, generation, reward):
    metrics = completion_metrics(summaries, [])
    assert metrics["generation_seconds"] == pytest.approx(generation)
    assert metrics["tokens_per_second"] == pytest.approx(100 * len(summaries) / generation)
    assert metrics["reward_seconds"] == pytest.approx(reward)
