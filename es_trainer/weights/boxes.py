"""The slice of a parameter that a process has, as boxes: ranges of its rows, columns and so on."""

from collections.abc import Iterator

import torch

from .part import Part


Offsets = tuple[int, ...]


def chunks(part: Part, values: torch.Tensor) -> list[tuple[Offsets, torch.Tensor]]:
    """
    The boxes of the whole parameter that a slice of it is made of, as formats of checkpoints have them.

    A piece that begins and ends within rows is at most `2 * dims - 1` boxes, and columns are one, however many rows
    there are.

    Args:
        part ([`Part`]):
            Which slice it is.
        values (`torch.Tensor`):
            Something of the slice, flat.

    Returns:
        `list[tuple[tuple[int, ...], torch.Tensor]]`: where each box begins, and a view of its values in its shape.
    """
    if part.numel == 0:
        return []
    lead = _leading_dims(part)
    shape = tuple(part.shape[lead:])
    # As often as the slice has a run within what is behind the leading dimensions
    runs = max(1, torch.Size(shape).numel() // part.period)
    values = values.view(*part.shape[:lead], runs, part.length)
    found = []
    for run in range(runs):
        start = run * part.period + part.offset
        at = 0
        for offsets, sizes in _boxes(start, start + part.length, shape):
            numel = torch.Size(sizes).numel()
            box = values[..., run, at : at + numel].view(part.shape[:lead] + torch.Size(sizes))
            found.append(((0,) * lead + offsets, box))
            at += numel
    return found


def _leading_dims(part: Part) -> int:
    """How many dimensions, from the first on, a slice has all of, with the same of what is behind them in each."""
    behind = part.shape.numel()
    for dim, size in enumerate(part.shape):
        if behind // size % part.period != 0:
            return dim
        behind //= size
    return len(part.shape)


def _boxes(start: int, stop: int, shape: Offsets) -> Iterator[tuple[Offsets, Offsets]]:
    """Offsets and sizes of the boxes that the flat indices from `start` to `stop` are, in their order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = torch.Size(shape[1:]).numel()
    first, last = -(-start // row), stop // row  # rows that are whole
    if first > last:  # all within one row
        yield from _within_row(last, start, stop, row, shape)
        return
    yield from _within_row(first - 1, start, first * row, row, shape)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _within_row(last, last * row, stop, row, shape)


def _within_row(index: int, start: int, stop: int, row: int, shape: Offsets) -> Iterator[tuple[Offsets, Offsets]]:
    for offsets, sizes in _boxes(start - index * row, stop - index * row, shape[1:]):
        yield (index, *offsets), (1, *sizes)
