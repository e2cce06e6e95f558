"""Whether the rewards of a population say anything about its members: an analysis of variance."""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import fdtri

from .fitness import ROUNDING, mean, of_pairs


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


def signal(rewards: np.ndarray, members_per_prompt: int | None = None) -> Signal:
    """
    The analysis of variance of members and prompts.

    - Where all members have the same prompts, it is the two-way analysis without replication (Hoyt, 1941; the same
      number as Cronbach's alpha). How easy prompts are does not count. Prompts that not all members have are left out,
      and so are members that have none.
    - Where each member has prompts of its own, it is the one-way analysis of members (ICC(1, k) of Shrout and Fleiss,
      1979). How easy a member's prompts are is a part of its luck.
    - Where each pair has prompts of its own, it is the one-way analysis of the pairs' differences, in which the ease
      of prompts is not. Which member of a pair comes first means nothing, so their mean is known to be 0, and is not
      estimated.

    In the latter two, some may have fewer prompts than others. The interval is an approximation then.

    Args:
        rewards (`np.ndarray`):
            Shape `(members, prompts)`; NaN where a completion does not count.
        members_per_prompt (`int`, *optional*):
            How many members have the same prompts: those that follow each other. If `None`, all of them; 2 are pairs.

    Returns:
        [`Signal`]: NaN where fewer than two members, pairs or prompts are left, or all have the same mean.
    """
    rewards = rewards / (np.nanmax(np.abs(rewards), initial=0.0) or 1.0)  # so that squares do not overflow
    if members_per_prompt is None:
        return _two_way(rewards)
    if members_per_prompt == 1:
        return _one_way(rewards)
    return _one_way(of_pairs(rewards, -1), about=0.0)


def _one_way(values: np.ndarray, about: float | None = None) -> Signal:
    """That of values of shape (members, prompts), about a mean that is known, or about their own."""
    values = values[~np.isnan(values).all(axis=1)]
    known = ~np.isnan(values)
    of_residual = int(known.sum()) - len(values)
    if len(values) < 2 or of_residual < 1:
        return UNKNOWN
    by_member = np.nanmean(values, axis=1)
    center = np.nanmean(values) if about is None else about
    of_members = len(values) - (about is None)
    members_square = (known.sum(axis=1) * np.square(by_member - center)).sum() / of_members
    residual_square = np.nansum(np.square(values - by_member[:, None])) / of_residual
    return _of_squares(members_square, residual_square, of_members, of_residual)


def _two_way(rewards: np.ndarray) -> Signal:
    rewards = rewards[~np.isnan(rewards).all(axis=1)]
    rewards = rewards[:, ~np.isnan(rewards).any(axis=0)]
    members, prompts = rewards.shape
    if min(members, prompts) < 2:
        return UNKNOWN
    by_member = rewards.mean(axis=1, keepdims=True)
    by_prompt = rewards.mean(axis=0, keepdims=True)
    residual = rewards - by_member - by_prompt + rewards.mean()
    of_members, of_residual = members - 1, (members - 1) * (prompts - 1)
    members_square = prompts * np.square(by_member - rewards.mean()).sum() / of_members
    residual_square = np.square(residual).sum() / of_residual
    return _of_squares(members_square, residual_square, of_members, of_residual)


def _of_squares(members_square: float, residual_square: float, of_members: int, of_residual: int) -> Signal:
    """The signal by mean squares and their degrees of freedom."""
    if members_square <= ROUNDING**2:
        return UNKNOWN
    unreliable = residual_square / members_square
    tail = (1 - CONFIDENCE) / 2
    low, high = (1 - unreliable * fdtri(of_members, of_residual, p) for p in (1 - tail, tail))
    return Signal(float(1 - unreliable), float(low), float(high))


def settled(rewards: np.ndarray, members_per_prompt: int | None = None) -> np.ndarray:
    """
    Which prompts tell no members apart, because all that have them were rewarded the same.

    Args:
        rewards (`np.ndarray`):
            Shape `(members, prompts)`; NaN where a completion does not count.
        members_per_prompt (`int`, *optional*):
            How many members have the same prompts: those that follow each other. If `None`, all of them.

    Returns:
        `np.ndarray`: Shape `(all prompts,)`, of booleans. Prompts that count for one member at most are among them.
    """
    members, prompts = rewards.shape
    together = rewards.reshape(-1, members_per_prompt or members, prompts)
    with np.errstate(invalid="ignore"):
        highest, lowest = (reduce(together, axis=1).ravel() for reduce in (np.fmax.reduce, np.fmin.reduce))
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
