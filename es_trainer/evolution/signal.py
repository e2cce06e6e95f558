"""Whether the rewards of a population say anything about its members: a two-way analysis of variance."""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import fdtri

from .fitness import ROUNDING, mean


CONFIDENCE = 0.95  # of the interval


class Signal(NamedTuple):
    """
    How much of the differences in fitness is of the members, and not of the prompts that they were asked.

    Args:
        reliability (`float`):
            1 - residual mean square / members' mean square: the share of the variance of the members' fitness that
            would come again with other prompts. It is 1 where members differ by the same on all prompts, near 0 where
            they differ by luck, and may be negative. NaN where it cannot be told.
        low, high (`float`):
            Its interval of 95 % confidence (Feldt, 1965, by the F distribution).
    """

    reliability: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Whether it can be told."""
        return not math.isnan(self.reliability)


UNKNOWN = Signal(math.nan, math.nan, math.nan)


def signal(rewards: np.ndarray) -> Signal:
    """
    The two-way analysis of variance without replication (Hoyt, 1941; the same number as Cronbach's alpha).

    Args:
        rewards (`np.ndarray`):
            Shape `(members, prompts)`; NaN where a completion does not count. Prompts that not all members have are
            left out, and so are members that have none.

    Returns:
        [`Signal`]: NaN where fewer than two members or prompts are left, or all members have the same mean.
    """
    rewards = rewards[~np.isnan(rewards).all(axis=1)]
    rewards = rewards[:, ~np.isnan(rewards).any(axis=0)]
    members, prompts = rewards.shape
    if min(members, prompts) < 2:
        return UNKNOWN
    scale = np.abs(rewards).max() or 1.0  # so that squares do not overflow
    rewards = rewards / scale
    by_member = rewards.mean(axis=1, keepdims=True)
    by_prompt = rewards.mean(axis=0, keepdims=True)
    residual = rewards - by_member - by_prompt + rewards.mean()
    of_members, of_residual = members - 1, (members - 1) * (prompts - 1)
    members_square = prompts * np.square(by_member - rewards.mean()).sum() / of_members
    residual_square = np.square(residual).sum() / of_residual
    if members_square <= ROUNDING**2:
        return UNKNOWN
    unreliable = residual_square / members_square
    tail = (1 - CONFIDENCE) / 2
    low, high = (1 - unreliable * fdtri(of_members, of_residual, p) for p in (1 - tail, tail))
    return Signal(float(1 - unreliable), float(low), float(high))


def settled(rewards: np.ndarray) -> np.ndarray:
    """
    Which prompts tell no members apart, because all of them were rewarded the same.

    Args:
        rewards (`np.ndarray`):
            Shape `(members, prompts)`; NaN where a completion does not count.

    Returns:
        `np.ndarray`: Shape `(prompts,)`, of booleans. Prompts that at most one member has are among them.
    """
    with np.errstate(invalid="ignore"):
        highest, lowest = np.fmax.reduce(rewards, axis=0), np.fmin.reduce(rewards, axis=0)
        return ~(highest - lowest > ROUNDING * np.fmax(np.abs(highest), np.abs(lowest)))


def expected_gain(fitness: np.ndarray, reliability: float, utilities: np.ndarray, step_length: float) -> float:
    """
    By how much the update would raise the reward if rewards were linear in the weights.

    A member's noise raises the reward by what it was rewarded above the mean, so far as that is no luck, which the
    signal says. The update goes `learning_rate / sigma * utility / N` of that way for each member, since it is
    `learning_rate / N * sum(utility * noise)` (equation 5 of arXiv 2509.24372) and the noise was scaled by sigma.

    Args:
        fitness (`np.ndarray`):
            Shape `(members,)`; NaN for a member without one.
        reliability (`float`):
            That of the [`signal`].
        utilities (`np.ndarray`):
            Shape `(members,)`.
        step_length (`float`):
            Learning rate divided by sigma.
    """
    above = np.where(np.isnan(fitness), 0.0, fitness - mean(fitness))
    return step_length * float(np.dot(utilities, above)) / len(utilities) * reliability
