"""From rewards to utilities, the numbers by which the members' noises are weighted."""

import math
from typing import get_args

import numpy as np

from ..choices import FitnessShaping, shaping_problem


# Numbers are equal if they differ by less than this, relative to the rewards that they are made of. A reward is a
# weighted sum of functions and a mean over generations: each of its roundings is off by at most half an epsilon of
# what is summed up, and this is room for 64 of them. Sums here add next to nothing, as they are exact before they are
# rounded once (`math.fsum`), which also makes them the same in every order.
ROUNDING = 32 * np.finfo(np.float64).eps


def mean(values: np.ndarray, axis: int | None = None) -> np.ndarray | float:
    """Mean of the numbers that count; NaN where none does. The largest floats do not overflow."""
    return _mean(values.ravel()) if axis is None else np.apply_along_axis(_mean, axis, values)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    if not known.size:
        return math.nan
    if np.isinf(known).any():
        with np.errstate(invalid="ignore"):
            return float(known.sum())
    scale = _scale(known)
    return math.fsum((known / scale).tolist()) / known.size * scale


def deviation(values: np.ndarray) -> float:
    """Standard deviation of the numbers that count; NaN where none does. The largest floats do not overflow."""
    scale = _scale(values)
    with np.errstate(invalid="ignore"):  # infinite ones have none
        centered = values / scale - mean(values / scale)
    return math.sqrt(mean(centered**2)) * scale


def _scale(values: np.ndarray) -> float:
    """A power of two near the largest of the numbers: a division by it is exact, and squares do not overflow then."""
    largest = np.nanmax(np.abs(values), initial=0.0)
    return 2.0 ** (math.frexp(largest)[1] - 1) if math.isfinite(largest) else 1.0


def total_reward(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    Weighted sum of the reward functions.

    Args:
        rewards (`np.ndarray`):
            Shape `(completions, functions)`; NaN where a function does not apply.
        weights (`np.ndarray`):
            Shape `(functions,)`.

    Returns:
        `np.ndarray`: Shape `(completions,)`; NaN where no function applies.

    Raises:
        `ValueError`: If a sum is larger than floats can be.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.nansum(rewards * weights, axis=-1)
    for row in np.flatnonzero(~np.isfinite(total)):
        raise ValueError(
            f"The weighted sum of the rewards of completion {row} is larger than a float can be: the rewards are "
            f"{rewards[row].tolist()}, their weights {weights.tolist()}. Return smaller ones, or lower "
            "`reward_weights`."
        )
    return np.where(np.isnan(rewards).all(axis=-1), np.nan, total)


def normalized_sum(by_function: np.ndarray, weights: np.ndarray, members_per_prompt: int | None = None) -> np.ndarray:
    """
    Weighted sum of reward functions of which each was brought to the scale of the others before: less its mean over
    the members that have a prompt, and divided by the standard deviation of the members' [`fitness`] by it. (GDPO,
    arXiv 2601.05242, whose groups are the completions of one prompt.)

    Args:
        by_function (`np.ndarray`):
            Shape `(functions, members, prompts)`; NaN where a function does not apply.
        weights (`np.ndarray`):
            Shape `(functions,)`.
        members_per_prompt (`int`, *optional*):
            See [`fitness`]. With 1, the mean over all prompts is taken, as the others say nothing about a prompt.

    Returns:
        `np.ndarray`: Shape `(members, prompts)`; NaN where no function applies. A function by which all members have
        the same fitness counts nothing.
    """
    total = np.zeros(by_function.shape[1:])
    for rewards, weight in zip(by_function, weights, strict=True):
        scale = _scale(rewards)
        rewards = rewards / scale
        values = fitness(rewards, members_per_prompt)
        if not _all_equal(values):
            total += np.nan_to_num(weight * _less_ease(rewards, members_per_prompt) / deviation(values))
    return np.where(np.isnan(by_function).all(axis=0), np.nan, total)


def fitness(rewards: np.ndarray, members_per_prompt: int | None = None) -> np.ndarray:
    """
    How good the members are: the mean of a member's rewards, less how much easier its prompts were than all prompts.

    How easy a prompt is, its mean over the members that have it says. Where all members have the same prompts and
    nothing is missing, fitness is the mean of the rewards.

    Args:
        rewards (`np.ndarray`):
            Shape `(members, prompts)`; NaN where a completion does not count.
        members_per_prompt (`int`, *optional*):
            How many members have the same prompts: those that follow each other. If `None`, all of them. With 2, these
            are pairs: fitness is the mean of all rewards, plus or minus half of the pair's mean difference on the
            prompts that count for both. With 1, every member has prompts of its own, of which nobody can say how easy
            they are: fitness is the mean of the rewards.

    Returns:
        `np.ndarray`: Shape `(members,)`. It is the same number for members whose fitness differs by rounding errors
        only, and NaN for a member that has less than half of the prompts that any member has.
    """
    return _fitness(*_comparable(rewards, members_per_prompt)) + _common_part(rewards, members_per_prompt)


def _comparable(rewards: np.ndarray, members_per_prompt: int | None) -> tuple[np.ndarray, np.ndarray]:
    """
    What the rewards say about members, of shape (members, prompts), as if all of them had the same prompts, and what
    its rounding errors are relative to.
    """
    magnitudes = np.abs(rewards)
    if members_per_prompt is None:
        return rewards, magnitudes
    if members_per_prompt == 1:
        return mean(_of_judged(rewards), axis=1)[:, None], mean(magnitudes, axis=1)[:, None]
    return _less_ease(rewards, members_per_prompt), np.repeat(of_pairs(magnitudes, 1), 2, axis=0)


def _common_part(rewards: np.ndarray, members_per_prompt: int | None) -> float:
    """What `_comparable` has taken away from all members: how easy all prompts are."""
    return mean(of_pairs(rewards, 1)) if members_per_prompt == 2 else 0.0


def _less_ease(rewards: np.ndarray, members_per_prompt: int | None) -> np.ndarray:
    """The rewards, less the mean of those who have the prompt. Those of a pair differ in the sign, and in no bit."""
    if members_per_prompt == 2:
        half = of_pairs(rewards, -1)
        return np.stack([half, -half], axis=1).reshape(rewards.shape)
    return rewards - mean(rewards, axis=0 if members_per_prompt is None else None)


def of_pairs(rewards: np.ndarray, sign: int) -> np.ndarray:
    """Half of the sum (1) or difference (-1) of both members' rewards, of shape (pairs, prompts)."""
    return rewards[::2] / 2 + sign * (rewards[1::2] / 2)


def _fitness(rewards: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    rewards = _of_judged(rewards)
    scale = _scale(rewards)
    rewards = rewards / scale  # so that differences do not overflow
    magnitudes = np.where(np.isnan(rewards), np.nan, magnitudes / scale)

    ease = mean(rewards, axis=0)
    own_ease = np.where(np.isnan(rewards), np.nan, ease)
    values = mean(rewards, axis=1) - (mean(own_ease, axis=1) - mean(ease))
    # Where nothing is missing, the bracket is exactly zero, and has no errors of other members' rewards
    missing = (np.isnan(rewards) & ~np.isnan(ease)).any(axis=1)
    errors = mean(magnitudes, axis=1) + 2 * missing * np.nanmax(mean(magnitudes, axis=0), initial=0.0)
    return _merge_ties(values, ROUNDING * errors) * scale


def _of_judged(rewards: np.ndarray) -> np.ndarray:
    """The rewards without those of members that have less than half of the prompts that any member has."""
    known = ~np.isnan(rewards)
    judged = 2 * known.sum(axis=1) >= known.any(axis=0).sum()
    return np.where(judged[:, None], rewards, np.nan)


def _merge_ties(values: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Give values that differ by no more than their errors, and by no more from the next, their common mean."""
    order = np.argsort(values)[: np.count_nonzero(~np.isnan(values))]  # NaN comes last
    apart = np.diff(values[order]) > np.maximum(errors[order][1:], errors[order][:-1])
    merged = np.full(len(values), np.nan)
    for tied in np.split(order, np.flatnonzero(apart) + 1):
        merged[tied] = mean(values[tied])
    return merged


def _all_equal(values: np.ndarray) -> bool:
    return np.unique(values[~np.isnan(values)]).size <= 1


def _z_scores(values: np.ndarray) -> np.ndarray:
    """(value - mean) / standard deviation of one-dimensional values that are not all equal."""
    return (values - mean(values)) / deviation(values)


def _centered_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of values that are not all equal, spread evenly over [-0.5, 0.5]; equal ones share their mean rank."""
    ranks = np.full(len(values), np.nan)
    known = ~np.isnan(values)
    _, group, count = np.unique(values[known], return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks[known] = (last - (count + 1) / 2)[group]
    return ranks / (known.sum() - 1) - 0.5


def _prompt_z_scores(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Z-scores of each prompt's rewards, zeros where those are equal, and the magnitudes of which [`fitness`] asks."""
    values, magnitudes = np.zeros_like(rewards), np.zeros_like(rewards)
    for prompt, column in enumerate(rewards.T):
        column = _merge_ties(column, ROUNDING * np.abs(column))
        if _all_equal(column):
            values[:, prompt] = np.where(np.isnan(column), np.nan, 0.0)
        else:
            values[:, prompt], magnitudes[:, prompt] = _z_scores(column), np.abs(column) / deviation(column)
    return values, magnitudes


def utilities(rewards: np.ndarray, shaping: FitnessShaping, members_per_prompt: int | None = None) -> np.ndarray:
    """
    Weigh the members by their rewards.

    Where pairs have prompts of their own, a prompt's ease is the mean of the pair, which is subtracted before members
    are compared: luck with easy prompts moves nothing, neither by itself nor through the standard deviation.

    Args:
        rewards (`np.ndarray`):
            Shape `(members, prompts)` or `(members,)`; NaN where a completion does not count.
        shaping (`str`):
            - `"z_score"`: [`fitness`] minus its mean over the population, divided by its standard deviation (equation
              4 of arXiv 2509.24372).
            - `"centered_rank"`: the rank of the fitness, spread over [-0.5, 0.5] (arXiv 1703.03864).
            - `"prompt_z_score"`: the z-score of each prompt's reward over the population, then the mean over the
              prompts, so that easy and hard prompts weigh the same.
            - `"prompt_centered"`: each prompt's reward minus its mean over the population, divided by the standard
              deviation of all these differences, then the mean over the prompts (as EGGROLL, arXiv 2511.16652, whose
              code takes the deviation of the rewards). With one prompt it is the z-score; with more, the less
              their rewards agree about the members, the smaller are the utilities.
            - `"none"`: the same without the division.

            The two that begin with `"prompt_"` compare the members on each prompt. So they need members that have the
            same: all for the z-score, which is no more than a sign where there are two, and at least pairs for the
            other.
        members_per_prompt (`int`, *optional*):
            How many members have the same prompts; see [`fitness`]. If `None`, all of them.

    Returns:
        `np.ndarray`: Shape `(members,)`. All are zero where every member has the same fitness, up to rounding. A
        member without fitness has zero: it takes part in no mean, deviation or rank, and weighs like an average one.

    Raises:
        `ValueError`: If `shaping` is unknown or needs members that have the same prompts, or a reward is infinite.
    """
    if shaping not in get_args(FitnessShaping):
        names = ", ".join(map(repr, get_args(FitnessShaping)))
        raise ValueError(f"fitness_shaping={shaping!r} is unknown; choose one of {names}.")
    if (problem := shaping_problem(shaping, members_per_prompt)) is not None:
        raise ValueError(f"fitness_shaping={shaping!r} is not valid: {problem}")
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim == 1:
        rewards = rewards[:, None]
    if np.isinf(rewards).any():
        raise ValueError(f"Rewards must be finite, or NaN where they do not count, but are {rewards.tolist()}.")
    rewards, magnitudes = _comparable(rewards, members_per_prompt)
    rewards = _of_judged(rewards)
    scale = _scale(rewards)
    rewards, magnitudes = rewards / scale, magnitudes / scale
    values = _fitness(*(_prompt_z_scores(rewards) if shaping == "prompt_z_score" else (rewards, magnitudes)))
    if _all_equal(values):
        return np.zeros(len(values))
    if shaping == "z_score":
        values = _z_scores(values)
    elif shaping == "centered_rank":
        values = _centered_ranks(values)
    elif shaping in ("prompt_centered", "none"):
        ease = mean(rewards, axis=0)
        values = values - mean(ease)
        values = values * scale if shaping == "none" else values / deviation(rewards - ease)
    return np.where(np.isnan(values), 0.0, values)
