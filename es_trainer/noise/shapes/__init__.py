"""Shapes of the noise, one file each. A new one is a class with the methods of [`Gaussian`]."""

from collections.abc import Callable

from ...choices import PerturbationName
from .gaussian import Gaussian
from .low_rank import LowRank
from .sums import Factors, GaussianSum, LowRankSum, PrecomputedSum, StridedSum, Sum, Write, add_each


# By `perturbation`, given the rank
SHAPES: dict[PerturbationName, Callable[[int], Gaussian]] = {"gaussian": lambda rank: Gaussian(), "low_rank": LowRank}

__all__ = [
    "SHAPES",
    "Factors",
    "Gaussian",
    "GaussianSum",
    "LowRank",
    "LowRankSum",
    "PrecomputedSum",
    "StridedSum",
    "Sum",
    "Write",
    "add_each",
]
