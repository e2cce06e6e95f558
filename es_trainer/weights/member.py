"""One perturbation of the weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """
    One perturbation of the weights: `weights + sigma * sign * noise(seed)`.

    Args:
        seed (`int`):
            Key of the noise, in `[0, 2**63)`.
        sign (`int`, *optional*, defaults to `1`):
            `1`, `-1` for the mirrored half of an antithetic pair, or `0` for the unperturbed weights.
    """

    seed: int
    sign: int = 1

    @property
    def is_center(self) -> bool:
        """Whether it is the unperturbed weights."""
        return self.sign == 0

    def center(self) -> "Member":
        """The weights without the perturbation."""
        return Member(self.seed, 0)
