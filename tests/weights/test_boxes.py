from itertools import combinations

import pytest
import torch

from es_trainer.weights.boxes import chunks
from es_trainer.weights.part import Part


def boxes_of(part: Part) -> int:
    """How many boxes a slice is, after each was found to be where it says, and all together to be the slice."""
    whole = torch.arange(part.shape.numel()).view(part.shape)
    values = part.of(whole).clone()
    left = set(values.tolist())
    found = chunks(part, values)
    for offsets, box in found:
        assert torch.equal(whole[tuple(slice(o, o + size) for o, size in zip(offsets, box.shape, strict=True))], box)
        assert left >= set(box.flatten().tolist())
        left -= set(box.flatten().tolist())
        box.fill_(-1)  # a view: what is loaded arrives
    assert left == set() and torch.equal(values, torch.full_like(values, -1))
    return len(found)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (4, 1, 3), (2, 2, 3, 2)])
def test_every_piece(shape):
    numel = torch.Size(shape).numel()
    for start, stop in combinations(range(numel + 1), 2):
        assert 1 <= boxes_of(Part.piece("w", shape, start, stop - start)) <= 2 * len(shape) - 1


def test_pieces_that_are_a_box_are_one():
    assert boxes_of(Part.whole("w", (3, 4))) == boxes_of(Part.piece("w", (3, 4), 4, 8)) == 1
    assert boxes_of(Part.whole("w", ())) == 1
    assert boxes_of(Part.piece("w", (3, 4), 12, 0)) == 0


def test_slices_of_columns_and_of_experts():
    assert boxes_of(Part("w", torch.Size((1000, 8)), 2, 4, 8)) == 1
    # Rows of each expert's gate, then of its up projection
    assert boxes_of(Part("w", torch.Size((3, 8, 5)), 10, 10, 20)) == 2
    assert boxes_of(Part("w", torch.Size((3, 8, 5)), 7, 10, 20)) == 6
