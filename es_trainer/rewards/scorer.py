"""Calls reward functions by GRPOTrainer's protocol and checks what they return."""

import functools
import inspect
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerState

from ..evolution.fitness import total_reward


RewardFunc = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Scores:
    """
    Rewards of some completions.

    Args:
        by_function (`np.ndarray`):
            Shape `(completions, functions)`; NaN where a function does not apply.
        total (`np.ndarray`):
            Shape `(completions,)`; the weighted sum, NaN where no function applies.
        extra (`dict[str, list]`):
            Columns given to `log_extra`.
        metrics (`dict[str, list[float]]`):
            Values given to `log_metric`.
        seconds (`float`):
            Time that the functions took.
    """

    by_function: np.ndarray
    total: np.ndarray
    extra: dict[str, list[Any]]
    metrics: dict[str, list[float]]
    seconds: float


class Scorer:
    """
    Scores completions with one or several reward functions.

    Args:
        reward_funcs (`Callable` or `list[Callable]`):
            Called with `prompts`, `completions`, `completion_ids`, every other column of the dataset,
            `trainer_state`, `log_extra(column, values)` and `log_metric(name, value)` as keyword arguments. Each
            returns a number for every completion, or `None` where it does not apply.
        weights (`list[float]`, *optional*):
            Weight of each function; 1.0 if not given.

    Raises:
        `TypeError`: If a reward function cannot be called, or is a model.
        `ValueError`: If the number of weights is not that of the functions.
    """

    def __init__(self, reward_funcs: RewardFunc | list[RewardFunc], weights: list[float] | None = None):
        self.functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        if not self.functions:
            raise ValueError("`reward_funcs` is empty: give at least one reward function.")
        for function in self.functions:
            if isinstance(function, (str, nn.Module)):
                raise TypeError(
                    f"`reward_funcs` has {function if isinstance(function, str) else type(function).__name__!r}: "
                    "reward models are not supported; wrap the model in a function that returns a list of numbers."
                )
            if not callable(function):
                raise TypeError(
                    f"`reward_funcs` has {function!r}, which cannot be called. Give a function "
                    "`reward(completions, **kwargs)` that returns a number for each completion."
                )
        self.names = _distinct([_name(function) for function in self.functions])
        if weights is not None and len(weights) != len(self.functions):
            raise ValueError(
                f"`reward_weights` has {len(weights)} weights for {len(self.functions)} reward functions "
                f"({', '.join(self.names)}): give one for each."
            )
        self.weights = np.ones(len(self.functions)) if weights is None else np.array(weights, dtype=np.float64)

    def __call__(
        self,
        rows: list[dict[str, Any]],
        completions: list[str] | list[list[dict[str, str]]],
        completion_ids: list[list[int]],
        trainer_state: TrainerState,
    ) -> Scores:
        """
        Score completions.

        Args:
            rows (`list[dict[str, Any]]`):
                The dataset's row of each completion.
            completions (`list`):
                Texts, or lists of one assistant message for conversational prompts.
            completion_ids (`list[list[int]]`):
                Tokens of the completions.
            trainer_state ([`~transformers.TrainerState`]):
                Passed to the functions.

        Raises:
            `RuntimeError`: If a function raises.
            `ValueError`: If a function does not return one finite number or `None` for each completion.
        """
        extra: dict[str, list[Any]] = {}
        metrics: dict[str, list[float]] = {}
        keywords = {
            **{key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")},
            "prompts": [row["prompt"] for row in rows],
            "completions": completions,
            "completion_ids": completion_ids,
            "trainer_state": trainer_state,
            "log_extra": lambda column, values: extra.setdefault(column, []).extend(values),
            "log_metric": lambda name, value: metrics.setdefault(name, []).append(float(value)),
        }
        start = time.perf_counter()
        columns = []
        for name, function in zip(self.names, self.functions, strict=True):
            try:
                rewards = function(**keywords)
            except Exception as error:
                raise RuntimeError(f"Reward function {name!r} raised {type(error).__name__}: {error}") from error
            columns.append(_numbers(name, rewards, len(rows)))
        by_function = np.array(columns, dtype=np.float64).T
        seconds = time.perf_counter() - start
        return Scores(by_function, total_reward(by_function, self.weights), extra, metrics, seconds)


def _numbers(name: str, rewards: Any, count: int) -> list[float]:
    try:
        rewards = list(rewards)
    except TypeError:
        raise ValueError(
            f"Reward function {name!r} returned {rewards!r} instead of a list of {count} numbers, one per completion."
        ) from None
    if len(rewards) != count:
        raise ValueError(
            f"Reward function {name!r} returned {len(rewards)} rewards for {count} completions: it must return one "
            "number (or None) for each."
        )
    return [_number(name, row, reward) for row, reward in enumerate(rewards)]


def _number(name: str, row: int, reward: Any) -> float:
    if reward is None:
        return math.nan
    if isinstance(reward, torch.Tensor) and reward.numel() == 1:
        reward = reward.item()
    if not isinstance(reward, Real) or not math.isfinite(reward):
        raise ValueError(
            f"Reward function {name!r} returned {reward!r} for completion {row}: it must be a finite number, or None "
            "where the reward does not apply."
        )
    return float(reward)


def _name(function: RewardFunc) -> str:
    if isinstance(function, functools.partial):
        return _name(function.func)
    return function.__name__ if inspect.isroutine(function) else type(function).__name__


def _distinct(names: list[str]) -> list[str]:
    """Number the repetitions of a name, so that none hides another in the logs."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return distinct
