"""Sums of perturbations of a parameter, of which any slice can be written alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .. import noise
from ..jobs import Addition, Product


class Write(NamedTuple):
    """
    `target = source + sum`.

    Args:
        sum ([`Sum`]):
            What to add.
        source (`torch.Tensor` or `None`), target (`torch.Tensor`), start (`int`), rounding (`int`, *optional*):
            See [`Addition`].
    """

    sum: "Sum"
    source: torch.Tensor | None
    target: torch.Tensor
    start: int = 0
    rounding: int | None = None


def add_each(writes: Sequence[Write]) -> None:
    """Write several tensors; see [`noise.write_each`]. Strided slices are written one at a time."""
    noise.write_each([own.job(*where) for own, *where in writes if not isinstance(own, StridedSum)])
    for own, *where in writes:
        if isinstance(own, StridedSum):
            own.add(*where)


class GaussianSum:
    """Sum of full noises of one parameter: `sum_k coefficients[k] * noise(seeds[k])`."""

    def __init__(self, name: str, seeds: Sequence[int], coefficients: Sequence[float]):
        self.name = name
        self.seeds = seeds
        self.coefficients = coefficients

    def add(
        self, source: torch.Tensor | None, target: torch.Tensor, start: int = 0, rounding: int | None = None
    ) -> None:
        """Write `target = source + sum`; see [`noise.add`]."""
        noise.add(source, target, self.name, self.seeds, self.coefficients, start, rounding)

    def job(
        self, source: torch.Tensor | None, target: torch.Tensor, start: int = 0, rounding: int | None = None
    ) -> Addition:
        """What `add` does, as one of several jobs."""
        return Addition(source, target, noise.stream(self.name), self.seeds, self.coefficients, start, rounding)


class LowRankSum:
    """
    Sum of low-rank terms of one parameter, as one matrix product: `left @ right`.

    Args:
        left (`torch.Tensor` of shape `(matrices, rows, terms)`):
            Left factors of all terms, with their coefficients.
        right (`torch.Tensor` of shape `(matrices, terms, columns)`):
            Right factors.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor):
        self.left = left
        self.right = right

    def add(
        self, source: torch.Tensor | None, target: torch.Tensor, start: int = 0, rounding: int | None = None
    ) -> None:
        """Write `target = source + sum`, where the flat `target` begins at index `start` of the parameter; see
        [`noise.add`]. On every device, a value is one chain of additions, whatever slice is asked for."""
        noise.write_each([self.job(source, target, start, rounding)])

    def job(
        self, source: torch.Tensor | None, target: torch.Tensor, start: int = 0, rounding: int | None = None
    ) -> Product:
        """What `add` does, as one of several jobs."""
        return Product(source, target, self.left, self.right, start, rounding)


class StridedSum:
    """
    A sum for a strided slice of a parameter: `length` weights from `offset` on of every `period`.

    Args:
        whole ([`GaussianSum`] or [`LowRankSum`]):
            The sum for the whole parameter.
        offset (`int`):
            Index of the first weight of the slice within a period.
        length (`int`):
            Number of the weights of the slice in each period.
        period (`int`):
            Number of weights of the parameter from the start of a run to the start of the next.
    """

    def __init__(self, whole: GaussianSum | LowRankSum, offset: int, length: int, period: int):
        self.whole = whole
        self.offset = offset
        self.length = length
        self.period = period

    def add(
        self, source: torch.Tensor | None, target: torch.Tensor, start: int = 0, rounding: int | None = None
    ) -> None:
        """Write `target = source + sum`, where the flat `target` begins at index `start` of the slice; see
        [`noise.add`]."""
        if target.numel() == 0:
            return
        run, first = divmod(start, self.length)
        if first + target.numel() <= self.length:
            self.whole.add(source, target, run * self.period + self.offset + first, rounding)
            return
        longest = noise.piece_size(target.device)

        def piece(low: int, high: int) -> None:
            values = None if source is None else source[low:high]
            # A long run is written where it lies; around short ones, whole periods are computed, which takes no more
            # calls than the part has pieces
            if self.period > longest:
                self._add_slices(values, target[low:high], start + low, rounding)
            else:
                self._add_periods(values, target[low:high], start + low, rounding, longest // self.period)

        noise.for_pieces(piece, target.numel(), target.device)

    def _add_slices(self, source: torch.Tensor | None, target: torch.Tensor, start: int, rounding: int | None) -> None:
        done = 0
        while done < target.numel():
            run, first = divmod(start + done, self.length)
            stop = min(done + self.length - first, target.numel())
            values = None if source is None else source[done:stop]
            self.whole.add(values, target[done:stop], run * self.period + self.offset + first, rounding)
            done = stop

    def _add_periods(
        self, source: torch.Tensor | None, target: torch.Tensor, start: int, rounding: int | None, step: int
    ) -> None:
        first, last = start // self.length, -(-(start + target.numel()) // self.length)
        for run in range(first, last, step):
            rows = min(step, last - run)
            low = max(run * self.length, start) - start
            high = min((run + rows) * self.length, start + target.numel()) - start
            inside = slice(start + low - run * self.length, start + high - run * self.length)
            values = torch.zeros(rows * self.length, dtype=torch.float32, device=target.device)
            if source is not None:
                values[inside].copy_(source[low:high])
            periods = torch.zeros(rows, self.period, dtype=torch.float32, device=target.device)
            periods[:, self.offset : self.offset + self.length] = values.view(rows, self.length)
            sums = torch.empty_like(periods, dtype=target.dtype)
            self.whole.add(periods.view(-1), sums.view(-1), run * self.period, rounding)
            target[low:high].copy_(sums[:, self.offset : self.offset + self.length].reshape(-1)[inside])


class PrecomputedSum:
    """
    A sum that has been computed.

    Args:
        values (`torch.Tensor`):
            Its flat float32 values.
        first (`int`):
            Flat index of the first of them.
    """

    def __init__(self, values: torch.Tensor, first: int):
        self.values = values
        self.first = first

    def add(self, source: None, target: torch.Tensor, start: int = 0) -> None:
        """Write `target = sum`, where the flat `target` begins at index `start`."""
        target.copy_(self.values[start - self.first :][: target.numel()])


Sum = GaussianSum | LowRankSum | StridedSum | PrecomputedSum


@dataclass(frozen=True)
class Factors:
    """
    What the members of a group add to a parameter that they share: member m adds `left[m].T @ right[m]`.

    Args:
        left (`torch.Tensor` of shape `(members, matrices, rank, rows)`):
            Left factors, with the members' signs and the root of sigma.
        right (`torch.Tensor` of shape `(members, matrices, rank, columns)`):
            Right factors, with the root of sigma.
    """

    left: torch.Tensor
    right: torch.Tensor

    def to(self, dtype: torch.dtype) -> "Factors":
        """The same in another dtype."""
        return Factors(self.left.to(dtype).contiguous(), self.right.to(dtype).contiguous())
