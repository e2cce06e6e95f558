"""From rewards to utilities, the numbers by which the members' noises are weighted."""

import warnings
from typing import Literal

import numpy as np


FitnessShaping = Literal["z_score", "centered_rank", "prompt_z_score", "none"]


def mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean of the numbers that count; NaN where none does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, axis=axis)


def deviation(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Standard deviation of the numbers that count; NaN where none does."""
    return np.sqrt(mean((values - mean(values, axis=axis)) ** 2, axis=axis))


def total_reward(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    Weighted sum of the reward functions.

    Args:
        rewards (`np.ndarray`):
            Shape `(..., functions)`; NaN where a function does not apply.
        weights (`np.ndarray`):
            Shape `(functions,)`.

    Returns:
        `np.ndarray`: Shape `(...)`; NaN where no function applies.
    """
    total = np.nansum(rewards * weights, axis=-1)
    return np.where(np.isnan(rewards).all(axis=-1), np.nan, total)


def z_score(values: np.ndarray) -> np.ndarray:
    """(value - mean) / standard deviation over the first axis, leaving out NaN; zeros where all values are equal."""
    centered, spread = values - mean(values, axis=0), deviation(values, axis=0)
    # Equal values can differ from their own mean by a rounding error, which must not be blown up to a z-score of one
    equal = np.nanmax(values, axis=0, initial=-np.inf) <= np.nanmin(values, axis=0, initial=np.inf)
    return np.where(equal, 0.0, centered / np.where(equal | np.isnan(spread), 1.0, spread))


def centered_rank(values: np.ndarray) -> np.ndarray:
    """Ranks spread evenly over [-0.5, 0.5], leaving out NaN; equal values share their mean rank."""
    ranks = np.full(len(values), np.nan)
    known = ~np.isnan(values)
    _, group, count = np.unique(values[known], return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks[known] = (last - (count + 1) / 2)[group]
    return ranks / max(known.sum() - 1, 1) - 0.5 if len(count) > 1 else np.zeros(len(values))


def utilities(rewards: np.ndarray, shaping: FitnessShaping) -> np.ndarray:
    """
    Weigh the members by their rewards.

    Args:
        rewards (`np.ndarray`):
            Shape `(members, prompts)` or `(members,)`; NaN where a completion does not count. A member's fitness is
            the mean of its rewards.
        shaping (`str`):
            - `"z_score"`: fitness minus its mean over the population, divided by its standard deviation (equation 4
              of arXiv 2509.24372).
            - `"centered_rank"`: the rank of the fitness, spread over [-0.5, 0.5] (arXiv 1703.03864).
            - `"prompt_z_score"`: the z-score of each prompt's reward over the population, then the mean over the
              prompts, so that easy and hard prompts weigh the same.
            - `"none"`: the fitness.

    Returns:
        `np.ndarray`: Shape `(members,)`; all zeros where every member has the same fitness, and zero for a member
        that has no rewards.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim == 1:
        rewards = rewards[:, None]
    fitness = mean(rewards, axis=1)
    if shaping == "prompt_z_score":
        values = mean(z_score(rewards), axis=1)
    elif shaping == "centered_rank":
        values = centered_rank(fitness)
    elif shaping == "z_score":
        values = z_score(fitness)
    elif shaping == "none":
        known = fitness[~np.isnan(fitness)]
        values = fitness if known.size and known.max() > known.min() else np.zeros_like(fitness)
    else:
        raise ValueError(
            f"fitness_shaping={shaping!r} is unknown; choose 'z_score', 'centered_rank', 'prompt_z_score' or 'none'."
        )
    return np.nan_to_num(values, nan=0.0)
