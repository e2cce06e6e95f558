"""Low-rank noise."""

import itertools
import math
from collections.abc import Sequence

import torch

from .. import noise
from .gaussian import Gaussian
from .sums import Factors, GaussianSum, LowRankSum


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

    has_factors = True

    def __init__(self, rank: int = 1):
        self.rank = rank

    def combine_each(self, parameters, seeds, coefficients, device):
        matrices = {name: shape for name, shape in parameters if self.factored(shape)}
        drawn = self._draw(matrices, seeds, coefficients, device)
        sums = dict(zip(matrices, itertools.starmap(_as_product, drawn), strict=True))
        return [sums.get(name, GaussianSum(name, seeds, coefficients)) for name, _ in parameters]

    def factors_each(self, parameters, seeds, coefficients, device):
        # Each factor gets the root of the coefficient: with all of it, those of float16 would lose bits below 6e-5
        roots = [math.sqrt(abs(coefficient)) for coefficient in coefficients]
        signed = [math.copysign(root, coefficient) for root, coefficient in zip(roots, coefficients, strict=True)]
        matrices = {name: shape for name, shape in parameters if self.factored(shape)}
        drawn = dict(zip(matrices, self._draw(matrices, seeds, signed, device), strict=True))
        right = [of_seed for _, b in drawn.values() for of_seed in b]
        if right:
            torch._foreach_mul_(right, roots * len(drawn))
        factors = {name: Factors(a.mT, b.mT) for name, (a, b) in drawn.items()}
        return [factors.get(name) for name, _ in parameters]

    def factored(self, shape):
        return len(shape) >= 2

    def numbers(self, shape):
        if not self.factored(shape):
            return math.prod(shape)
        *matrices, rows, columns = shape
        return math.prod(matrices) * (rows + columns) * self.rank

    def _draw(
        self,
        shapes: dict[str, Sequence[int]],
        seeds: Sequence[int],
        coefficients: Sequence[float],
        device: torch.device,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        `coefficient * A / sqrt(rank)` and B of each parameter and seed, of shape (seeds, matrices, rows or columns,
        rank). On a GPU, the number of launches hardly depends on how many parameters there are.
        """
        sizes = [(len(seeds), self.numbers(shape)) for shape in shapes.values()]
        normals = [torch.empty(size, dtype=torch.float32, device=device) for size in sizes]
        noise.fill_each(normals, list(shapes), seeds)
        factors = [self._split(own, shape) for own, shape in zip(normals, shapes.values(), strict=True)]
        left = [of_seed for a, _ in factors for of_seed in a]
        if left:
            torch._foreach_div_(left, math.sqrt(self.rank))
            torch._foreach_mul_(left, [*coefficients] * len(factors))
        return factors

    def _split(self, normals: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        *matrices, rows, columns = shape
        count = math.prod(matrices)
        a, b = normals.split([count * rows * self.rank, count * columns * self.rank], dim=1)
        return a.view(-1, count, rows, self.rank), b.view(-1, count, columns, self.rank)


def _as_product(left: torch.Tensor, right: torch.Tensor) -> LowRankSum:
    """The sum over all seeds."""
    left, right = left.permute(1, 2, 0, 3).flatten(2), right.permute(1, 0, 3, 2).flatten(1, 2)
    return LowRankSum(left.contiguous(), right.contiguous())
