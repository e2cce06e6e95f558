"""Shapes of the noise, one file each. A new one is a class with the methods of [`Gaussian`]."""

from .gaussian import Gaussian
from .low_rank import LowRank
from .sums import Computed, Factors, Noises, Products, Scattered, Sum


__all__ = ["Computed", "Factors", "Gaussian", "LowRank", "Noises", "Products", "Scattered", "Sum"]
