"""From the rewards of several completions of a prompt to the reward of the prompt."""

import math
from collections.abc import Hashable, Sequence

import numpy as np

from ..choices import completions_needed
from .fitness import mean


def pass_at(rewards: np.ndarray, k: int) -> float:
    r"""
    The largest reward of k completions, expected if these are drawn from those that there are.

    For rewards of 0 and 1 it is the unbiased estimate of pass@k, 1 - C(n - c, k) / C(n, k) with c of n completions
    right (Chen et al., arXiv 2107.03374, equation 1). For others, the i-th smallest is the largest of C(i - 1, k - 1)
    of the C(n, k) choices.

    Args:
        rewards (`np.ndarray`):
            Shape `(completions,)`; NaN where a completion does not count.
        k (`int`):
            Number of completions.

    Returns:
        `float`: NaN if fewer than k completions count.
    """
    known = np.sort(rewards[~np.isnan(rewards)])
    if len(known) < k:
        return math.nan
    choices = [math.comb(i, k - 1) for i in range(len(known))]
    return math.fsum(c / math.comb(len(known), k) * r for c, r in zip(choices, known.tolist(), strict=True))


def tries(number: int) -> list[int]:
    """For which k pass@k of `number` completions is of interest: 1, 2, 4, ... and `number`."""
    return [1 << i for i in range((number - 1).bit_length())] + [number]


def _most_frequent(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of the key that is there most often; of several such keys, in the order in which they come first."""
    places: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    most = max(map(len, places.values()), default=0)
    return [of_key for of_key in places.values() if len(of_key) == most]


def elected(keys: Sequence[Hashable]) -> int:
    """Index of the first voter for the key that most vote for; of several such keys, for the one that comes first."""
    return _most_frequent(keys)[0][0]


def _majority(rewards: np.ndarray, keys: Sequence[Hashable]) -> float:
    """Mean reward of the completions with the key that most have; of all of these, if there are several such keys."""
    voters = np.flatnonzero(~np.isnan(rewards))
    winners = [i for of_key in _most_frequent([keys[i] for i in voters]) for i in of_key]
    return mean(rewards[voters][winners])


def prompt_rewards(rewards: np.ndarray, way: str, keys: Sequence[Sequence[Hashable]] | None = None) -> np.ndarray:
    """
    The reward of each prompt.

    Args:
        rewards (`np.ndarray`):
            Shape `(prompts, completions)`; NaN where a completion does not count.
        way (`str`):
            - `"mean"`: mean of the completions' rewards.
            - `"max"`: the best of them.
            - `"pass@k"`, for instance `"pass@4"`: the best of k, expected; see [`pass_at`].
            - `"majority"`: the reward of the answer that most completions give.
        keys (`list[list[Hashable]]`, *optional*):
            For the majority: the answer of each completion. Equal ones are one answer.

    Returns:
        `np.ndarray`: Shape `(prompts,)`; NaN where too few completions count.
    """
    if way == "mean":
        return mean(rewards, axis=1)
    if way == "max":
        return np.fmax.reduce(rewards, axis=1)
    if way == "majority":
        return np.array([_majority(of_prompt, of_keys) for of_prompt, of_keys in zip(rewards, keys, strict=True)])
    return np.array([pass_at(of_prompt, completions_needed(way)) for of_prompt in rewards])
