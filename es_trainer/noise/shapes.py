"""Shapes of the noise. A new one is a class with the methods of `Gaussian`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from . import noise


PerturbationName = Literal["gaussian", "low_rank"]


class Noises:
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


class Products:
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
        if target.numel() == 0:
            return
        if target.device.type == "cuda":
            from . import cuda

            cuda.add_product(source, target, start, self.left, self.right, rounding)
            return
        from . import cpu

        left, right = self.left.flatten(0, 1).numpy(), self.right.numpy()

        def kernel(values: np.ndarray, out: np.ndarray, low: int) -> None:
            cpu.add_product(values, out, start + low, left, right)

        noise.on_cpu(kernel, source, target, start, rounding)


class Scattered:
    """
    A sum for a part of a parameter that is not in one piece: `length` weights from `offset` on of every `period`.

    Args:
        terms ([`Noises`] or [`Products`]):
            The sum for the whole parameter.
        offset, length, period (`int`):
            What of it is wanted.
    """

    def __init__(self, terms: Noises | Products, offset: int, length: int, period: int):
        self.terms = terms
        self.offset = offset
        self.length = length
        self.period = period

    def add(
        self, source: torch.Tensor | None, target: torch.Tensor, start: int = 0, rounding: int | None = None
    ) -> None:
        """Write `target = source + sum`, where the flat `target` begins at index `start` of the part; see
        [`noise.add`]."""
        longest = noise.piece_size(target.device)

        def piece(low: int, high: int) -> None:
            values = None if source is None else source[low:high]
            # A long run is written where it lies; around short ones, whole periods are computed, which takes no more
            # calls than the part has pieces
            if self.period > longest:
                self._add_runs(values, target[low:high], start + low, rounding)
            else:
                self._add_periods(values, target[low:high], start + low, rounding, longest // self.period)

        noise.for_pieces(piece, target.numel(), target.device)

    def _add_runs(self, source: torch.Tensor | None, target: torch.Tensor, start: int, rounding: int | None) -> None:
        done = 0
        while done < target.numel():
            run, first = divmod(start + done, self.length)
            stop = min(done + self.length - first, target.numel())
            values = None if source is None else source[done:stop]
            self.terms.add(values, target[done:stop], run * self.period + self.offset + first, rounding)
            done = stop

    def _add_periods(
        self, source: torch.Tensor | None, target: torch.Tensor, start: int, rounding: int | None, step: int
    ) -> None:
        first, last = start // self.length, -(-(start + target.numel()) // self.length)
        for run in range(first, last, step):
            runs = min(step, last - run)
            low = max(run * self.length, start) - start
            high = min((run + runs) * self.length, start + target.numel()) - start
            inside = slice(start + low - run * self.length, start + high - run * self.length)
            values = torch.zeros(runs * self.length, dtype=torch.float32, device=target.device)
            if source is not None:
                values[inside].copy_(source[low:high])
            periods = torch.zeros(runs, self.period, dtype=torch.float32, device=target.device)
            periods[:, self.offset : self.offset + self.length] = values.view(runs, self.length)
            sums = torch.empty_like(periods, dtype=target.dtype)
            self.terms.add(periods.view(-1), sums.view(-1), run * self.period, rounding)
            target[low:high].copy_(sums[:, self.offset : self.offset + self.length].reshape(-1)[inside])


class Computed:
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


Sum = Noises | Products | Scattered | Computed


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


class Gaussian:
    """Full-rank noise: every weight gets its own standard normal, as in arXiv 2509.24372."""

    def combine(
        self,
        name: str,
        shape: Sequence[int],
        seeds: Sequence[int],
        coefficients: Sequence[float],
        device: torch.device,
    ) -> Noises | Products:
        """The sum `sum_k coefficients[k] * perturbation(seeds[k])` of the parameter `name` of that shape."""
        return Noises(name, seeds, coefficients)

    def factors(
        self,
        name: str,
        shape: Sequence[int],
        seeds: Sequence[int],
        coefficients: Sequence[float],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Factors | None:
        """The perturbations `coefficients[k] * perturbation(seeds[k])` as factors, or `None` if they have none."""
        return None

    def factored(self, shape: Sequence[int]) -> bool:
        """Whether perturbations of a parameter have factors."""
        return False

    def numbers(self, shape: Sequence[int]) -> int:
        """How many numbers a member's perturbation of a parameter is made of."""
        return math.prod(shape)


class LowRank(Gaussian):
    """
    Low-rank noise on matrices: E = A B^T / sqrt(rank) with standard normal A and B (EGGROLL, arXiv 2511.16652).

    The entries of E are uncorrelated and have variance 1, and the sum over a population has rank `rank * members`.
    Parameters of more than two dimensions are matrices side by side (the experts of a mixture); vectors get full
    noise.

    Args:
        rank (`int`, *optional*, defaults to `1`):
            Rank of each member's perturbation.
    """

    def __init__(self, rank: int = 1):
        self.rank = rank

    def combine(self, name, shape, seeds, coefficients, device):
        if not self.factored(shape):
            return Noises(name, seeds, coefficients)
        left, right = self._draw(name, shape, seeds, coefficients, device)
        left, right = left.permute(1, 2, 0, 3).flatten(2), right.permute(1, 0, 3, 2).flatten(1, 2)
        return Products(left.contiguous(), right.contiguous())

    def factors(self, name, shape, seeds, coefficients, device, dtype):
        if not self.factored(shape):
            return None
        # Each factor gets the root of the coefficient: with all of it, those of float16 would lose bits below 6e-5
        roots = [math.sqrt(abs(coefficient)) for coefficient in coefficients]
        signed = [math.copysign(root, coefficient) for root, coefficient in zip(roots, coefficients, strict=True)]
        left, right = self._draw(name, shape, seeds, signed, device)
        right = right * torch.tensor(roots, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
        return Factors(left.mT.to(dtype).contiguous(), right.mT.to(dtype).contiguous())

    def factored(self, shape):
        return len(shape) >= 2

    def numbers(self, shape):
        if not self.factored(shape):
            return math.prod(shape)
        *matrices, rows, columns = shape
        return math.prod(matrices) * (rows + columns) * self.rank

    def _draw(
        self,
        name: str,
        shape: Sequence[int],
        seeds: Sequence[int],
        coefficients: Sequence[float],
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`coefficient * A / sqrt(rank)` and B of each seed, of shape (seeds, matrices, rows or columns, rank)."""
        *matrices, rows, columns = shape
        count = math.prod(matrices)
        normals = torch.empty(len(seeds), self.numbers(shape), dtype=torch.float32, device=device)
        noise.fill_each(normals, name, seeds)
        a, b = normals.split([count * rows * self.rank, count * columns * self.rank], dim=1)
        a = a.view(-1, count, rows, self.rank) / math.sqrt(self.rank)
        a *= torch.tensor(coefficients, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
        return a, b.view(-1, count, columns, self.rank)
