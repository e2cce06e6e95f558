"""The cosine of two updates, by what they are made of and by the weights."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from es_trainer.evolution import EvolutionStrategy
from es_trainer.evolution.optimizer import UpdateRecord
from es_trainer.noise.shapes import Gaussian, LowRank


SHAPE = (300, 400)


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (UpdateRecord([1, 2], [1, 1], [3.0, 4.0]), UpdateRecord([1, 2], [1, 1], [4.0, 3.0]), 24 / 25),
        (UpdateRecord([1, 2], [1, 1], [3.0, 4.0]), UpdateRecord([1, 2], [1, 1], [-6.0, -8.0]), -1.0),
        (UpdateRecord([1, 2], [1, 1], [3.0, 4.0]), UpdateRecord([2, 3], [1, 1], [3.0, 4.0]), 12 / 25),
        (UpdateRecord([1, 2], [1, 1], [3.0, 4.0]), UpdateRecord([3, 4], [1, 1], [3.0, 4.0]), 0.0),
        # A population that has grown: the estimate is a mean, whose length does not matter
        (UpdateRecord([1], [1], [2.0]), UpdateRecord([1, 2, 3], [1, 1, 1], [1.0, 2.0, 2.0]), 1 / 3),
        # Of pairs, the differences count: (1 - 3, 2 - 5) and (0 - 1, 1 - 1)
        (
            UpdateRecord([1, 1, 2, 2], [1, -1, 1, -1], [1.0, 3.0, 2.0, 5.0]),
            UpdateRecord([1, 1, 2, 2], [1, -1, 1, -1], [0.0, 1.0, 1.0, 1.0]),
            2 / math.sqrt(13),
        ),
    ],
)
def test_it_follows_from_seeds_signs_and_utilities(mine, theirs, expected):
    assert mine.cosine(theirs) == pytest.approx(expected)
    assert theirs.cosine(mine) == pytest.approx(expected)


def test_there_is_none_with_an_update_that_moves_nothing():
    assert math.isnan(UpdateRecord([1, 2], [1, 1], [0.0, 0.0]).cosine(UpdateRecord([1, 2], [1, 1], [1.0, -1.0])))


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize(
    ("perturbation", "error"),
    [
        # Inner products of D normals with others, and with themselves, have a relative error of 1 / sqrt(D) and
        # sqrt(2 / D) = 0.004: five times that
        (Gaussian(), 0.02),
        # Squared norms of A and B, of 300 * 4 and 400 * 4 normals, have sqrt(2 / 1200 + 2 / 1600) = 0.054: that is the
        # error of a term of the sum, over the 10 terms of 0.1 each it is 0.017: five times that
        (LowRank(4), 0.085),
    ],
)
def test_it_is_that_of_the_moves_of_the_weights(perturbation, error, antithetic):
    parameter = nn.Parameter(torch.zeros(SHAPE))
    optimizer = EvolutionStrategy(
        [("weight", parameter)],
        population_size=20 if antithetic else 10,
        antithetic=antithetic,
        num_steps_per_population=3,
        perturbation=perturbation,
    )
    rng = np.random.default_rng(0)
    quality = rng.normal(size=optimizer.population_size)  # which members have on all prompts
    moves, records, before = [], [], parameter.detach().clone()
    for _ in range(4):
        optimizer.tell(optimizer.ask(), quality + 0.5 * rng.normal(size=len(quality)))
        records.append(optimizer.update_record)
        optimizer.step()
        moves.append((parameter.detach() - before).flatten().double())
        before = parameter.detach().clone()
    for i in range(3):
        actual = float(torch.nn.functional.cosine_similarity(moves[i], moves[i + 1], dim=0))
        assert records[i].cosine(records[i + 1]) == pytest.approx(actual, abs=error)
    assert records[0].cosine(records[1]) > 0.3  # so that there is something to agree on
    assert records[2].cosine(records[3]) == 0.0  # the fourth step has other members
