"""Shapes of the noise, one file each. A new one is a class with the methods of [`Gaussian`]."""

from .gaussian import Gaussian
from .low_rank import LowRank
from .sums import Factors, GaussianSum, LowRankSum, PrecomputedSum, StridedSum, Sum


__all__ = ["Factors", "Gaussian", "GaussianSum", "LowRank", "LowRankSum", "PrecomputedSum", "StridedSum", "Sum"]
