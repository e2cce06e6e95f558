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
            `1`, or `-1` for the mirrored half of an antithetic pair.
    """

    seed: int
    sign: int = 1
