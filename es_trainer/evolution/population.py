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
        seed (`int`):
            Seed of the random numbers that are common to all members, which are those of sampling.
    """

    members: tuple[Member, ...]
    seed: int

    @classmethod
    def sample(
        cls, size: int, seed: int, step: int, antithetic: bool = False, steps_per_population: int = 1
    ) -> "Population":
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
            steps_per_population (`int`, *optional*, defaults to `1`):
                Steps that have the same members.
        """
        seeds = _draw(size // 2 if antithetic else size, seed, step - step % steps_per_population)
        signs = (1, -1) if antithetic else (1,)
        # The prompts are new, so their random numbers are, too
        (common,) = _draw(1, seed, step)
        return cls(tuple(Member(s, sign) for s in seeds for sign in signs), common)

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)


def _draw(count: int, seed: int, step: int) -> list[int]:
    """The first seeds of a step."""
    draws = np.random.SeedSequence([seed, step]).generate_state(count, np.uint64)
    return (draws >> np.uint64(1)).tolist()
