"""Shapes of the noise. A new one is a class with the method of `Gaussian`."""

from collections.abc import Sequence

import torch

from . import noise


class Gaussian:
    """Full-rank noise: every weight gets its own standard normal, as in arXiv 2509.24372."""

    def add(
        self,
        source: torch.Tensor | None,
        target: torch.Tensor,
        name: str,
        seeds: Sequence[int],
        coefficients: Sequence[float],
        start: int = 0,
    ) -> None:
        """Write `target = source + sum_k coefficients[k] * perturbation_k`; see [`noise.add`]."""
        noise.add(source, target, name, seeds, coefficients, start)
