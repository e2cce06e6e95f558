"""The algorithm. Knows tensors; knows no language model."""

from .optimizer import EvolutionStrategy
from .population import Member, Population


__all__ = ["EvolutionStrategy", "Member", "Population"]
