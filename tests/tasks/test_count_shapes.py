import re
from collections import Counter

import numpy as np
import pytest

from es_trainer.rewards.count import count_reward
from es_trainer.scripts.data import load_task
from es_trainer.tasks import count_shapes
from es_trainer.tasks.count_shapes import COLORS, KINDS, draw


def connected(mask: np.ndarray) -> list[np.ndarray]:
    """Areas of a mask, by flooding from each point that none has."""
    areas, left = [], mask.copy()
    while left.any():
        area = np.zeros_like(mask)
        area[tuple(np.argwhere(left)[0])] = True
        while True:
            grown = area.copy()
            for axis in (0, 1):
                for by in (1, -1):
                    grown |= np.roll(area, by, axis)
            grown &= mask
            if (grown == area).all():
                break
            area = grown
        areas.append(area)
        left &= ~area
    return areas


def shape_of(area: np.ndarray) -> str:
    """By how much of its box a shape fills: all of it, pi/4 or half."""
    rows, columns = np.where(area)
    share = area.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    return "square" if share > 0.9 else "circle" if share > 0.65 else "triangle"


def counted(image) -> Counter:
    pixels = np.asarray(image)
    return Counter(
        (color, shape_of(area))
        for color, value in COLORS.items()
        for area in connected((pixels == value).all(axis=-1))
    )


def test_counts_are_what_is_in_the_pictures():
    task = count_shapes(train_size=12, eval_size=6, seed=1)
    for row in [*task.train_dataset, *task.eval_dataset]:
        color, shape = re.fullmatch(r"How many (\w+) (\w+)s are .*alone\.", row["prompt"][0]["content"]).groups()
        found = counted(row["image"])
        assert found[color, shape] == row["count"]
        assert found.total() > row["count"]  # there are others, too
    assert set(count_shapes(60, 1).train_dataset["count"]) == set(range(6))


def test_pictures_follow_from_the_seed_and_differ():
    first, again, other = count_shapes(20, 10, seed=5), count_shapes(30, 10, seed=5), count_shapes(20, 10, seed=6)

    def pixels(dataset):
        return [row["image"].tobytes() for row in dataset]

    assert pixels(first.eval_dataset) == pixels(again.eval_dataset)
    assert pixels(first.train_dataset) == pixels(again.train_dataset)[:20]
    assert pixels(first.eval_dataset) != pixels(other.eval_dataset)
    every = pixels(first.train_dataset) + pixels(first.eval_dataset)
    assert len(set(every)) == 30
    assert first.train_dataset[0]["image"].size == (224, 224)


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_each_kind_can_be_told_from_the_others(kind):
    assert counted(draw(((*kind, 10, 10, 30),))) == {kind: 1}


def test_reward():
    texts = ["3", " 3.\n", "three", "3 circles", "4", "13", ""]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert count_reward(messages, count=[3] * 7) == [1, 1, 0, 0, 0, 0, 0]
    assert count_reward(["0"], count=[0]) == [1]


def test_it_is_known_by_name():
    task = load_task("count_shapes")
    assert (len(task.train_dataset), len(task.eval_dataset)) == (200, 100)
    with pytest.raises(ValueError, match="eval_size=0 leaves the split without a picture"):
        count_shapes(eval_size=0)
