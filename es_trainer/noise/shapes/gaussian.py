"""Full-rank noise."""

import math
from collections.abc import Sequence

import torch

from .sums import Factors, GaussianSum, LowRankSum


class Gaussian:
    """Full-rank noise: every weight gets its own standard normal, as in arXiv 2509.24372."""

    has_factors = False  # whether members of a population batch share the weights, and have only factors of their own

    def combine(
        self,
        name: str,
        shape: Sequence[int],
        seeds: Sequence[int],
        coefficients: Sequence[float],
        device: torch.device,
    ) -> GaussianSum | LowRankSum:
        """The sum `sum_k coefficients[k] * perturbation(seeds[k])` of the parameter `name` of that shape."""
        (combined,) = self.combine_each([(name, shape)], seeds, coefficients, device)
        return combined

    def combine_each(
        self,
        parameters: Sequence[tuple[str, Sequence[int]]],
        seeds: Sequence[int],
        coefficients: Sequence[float],
        device: torch.device,
    ) -> list[GaussianSum | LowRankSum]:
        """The same for several parameters, given their names and shapes."""
        return [GaussianSum(name, seeds, coefficients) for name, _ in parameters]

    def factors_each(
        self,
        parameters: Sequence[tuple[str, Sequence[int]]],
        seeds: Sequence[int],
        coefficients: Sequence[float],
        device: torch.device,
    ) -> list[Factors | None]:
        """
        The perturbations `coefficients[k] * perturbation(seeds[k])` of several parameters, given their names and
        shapes, as float32 factors, or `None` where they have none.
        """
        return [None for _ in parameters]

    def factored(self, shape: Sequence[int]) -> bool:
        """Whether perturbations of a parameter have factors."""
        return False

    def numbers(self, shape: Sequence[int]) -> int:
        """How many numbers a member's perturbation of a parameter is made of."""
        return math.prod(shape)
