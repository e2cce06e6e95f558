"""Which perturbations a step tries."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..weights.member import Member


@dataclass(frozen=True)
class Population:
    """
    The members of one step.

    Args:
        members (`tuple[Member, ...]`):
            The members, in the order in which their fitness is told.
    """

    members: tuple[Member, ...]

    @classmethod
    def sample(cls, size: int, seed: int, step: int, antithetic: bool = False) -> "Population":
        """
        Draw the population of a step. The same arguments give the same members.

        Args:
            size (`int`):
                Number of members; even if `antithetic`.
            seed (`int`):
                Seed of the run.
            step (`int`):
                Number of updates done so far.
            antithetic (`bool`, *optional*, defaults to `False`):
                Draw half as many seeds and use each with both signs (mirrored sampling).
        """
        draws = np.random.SeedSequence([seed, step]).generate_state(size // 2 if antithetic else size, np.uint64)
        seeds = (draws >> np.uint64(1)).tolist()
        signs = (1, -1) if antithetic else (1,)
        return cls(tuple(Member(s, sign) for s in seeds for sign in signs))

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)
