"""Calls reward functions by GRPOTrainer's protocol and checks what they return."""

import asyncio
import functools
import inspect
import math
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from transformers.utils import logging

from ..evolution.fitness import total_reward


if TYPE_CHECKING:
    from ..config import ESConfig


logger = logging.get_logger(__name__)

Rewards = Sequence[float | None]
# The name of a reward model, a reward model, or a function that returns a number for each completion
RewardFunc = str | PreTrainedModel | Callable[..., Rewards] | Callable[..., Awaitable[Rewards]]


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
    Scores completions with one or several reward functions and models.

    Args:
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            Functions are called with `prompts`, `completions`, `completion_ids`, every other column of the dataset,
            `trainer_state`, `log_extra(column, values)` and `log_metric(name, value)` as keyword arguments. Each
            returns a number for every completion, or `None` where it does not apply. Those that are `async` run
            together. Models, and names of models, are of sequence classification: see [`RewardModel`].
        weights (`list[float]`, *optional*):
            Weight of each function; 1.0 if not given.
        processing_classes ([`~transformers.PreTrainedTokenizerBase`] or `list`, *optional*):
            Tokenizer of each reward model; where it is `None`, it is loaded by the model's name. Entries of functions
            are ignored.

    Raises:
        `TypeError`: If a reward function cannot be called.
        `ValueError`: If the number of weights or tokenizers is not that of the functions.
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | list[RewardFunc],
        weights: list[float] | None = None,
        processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
    ):
        self.functions = list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
        if not self.functions:
            raise ValueError("`reward_funcs` is empty: give at least one reward function.")
        for function in self.functions:
            other_module = isinstance(function, nn.Module) and not _is_model(function)
            if other_module or not (isinstance(function, str) or callable(function)):
                raise TypeError(
                    f"`reward_funcs` has {function!r}. Give a function `reward(completions, **kwargs)` that returns a "
                    "number for each completion, or a model of Transformers for sequence classification, or its name."
                )
        self.names = _distinct([_name(function) for function in self.functions])
        if processing_classes is None:
            processing_classes = [None] * len(self.functions)
        self.processing_classes = (
            list(processing_classes) if isinstance(processing_classes, list) else [processing_classes]
        )
        for field, values in (("reward_weights", weights), ("reward_processing_classes", self.processing_classes)):
            if values is not None and len(values) != len(self.functions):
                raise ValueError(
                    f"`{field}` has {len(values)} entries for {len(self.functions)} reward functions "
                    f"({', '.join(self.names)}): give one for each."
                )
        self.weights = np.ones(len(self.functions)) if weights is None else np.array(weights, dtype=np.float64)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._warned_of_unscored = False

    def load_models(self, args: "ESConfig") -> None:
        """Load the reward models that are given by name, and put all of them on the device."""
        from .model import RewardModel

        for i, function in enumerate(self.functions):
            if isinstance(function, str) or _is_model(function):
                self.functions[i] = RewardModel(function, self.processing_classes[i], args)

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
            `ValueError`: If a function does not return one finite number or `None` for each completion, or logs
                another number of extra values.
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
        results = self._call_functions(keywords)
        for column, values in extra.items():
            if len(values) != len(rows):
                raise ValueError(
                    f"Reward functions gave `log_extra({column!r}, ...)` {len(values)} values for {len(rows)} "
                    "completions: give one for each."
                )
        columns = [_numbers(name, result, len(rows)) for name, result in zip(self.names, results, strict=True)]
        by_function = np.array(columns, dtype=np.float64).T
        seconds = time.perf_counter() - start
        unscored = np.flatnonzero(np.isnan(by_function).all(axis=1))
        if unscored.size and not self._warned_of_unscored:
            self._warned_of_unscored = True
            logger.warning(
                f"No reward function applies to some completions, for instance to {completions[unscored[0]]!r} of the "
                f"prompt {rows[unscored[0]]['prompt']!r}: they do not count. (Shown once.)"
            )
        return Scores(by_function, total_reward(by_function, self.weights), extra, metrics, seconds)

    def _call_functions(self, keywords: dict[str, Any]) -> list[Any]:
        """What the functions return; those that are async run together, while the others run one after another."""
        running: dict[int, Future] = {
            i: asyncio.run_coroutine_threadsafe(function(**keywords), self._event_loop())
            for i, function in enumerate(self.functions)
            if _is_async(function)
        }
        results = []
        try:
            for i, (name, function) in enumerate(zip(self.names, self.functions, strict=True)):
                try:
                    results.append(running[i].result() if i in running else function(**keywords))
                except Exception as error:
                    raise RuntimeError(f"Reward function {name!r} raised {type(error).__name__}: {error}") from error
        finally:
            for future in running.values():
                future.cancel()
        return results

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        # One for good, as connections that a function keeps open belong to the loop they were opened in
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="es_trainer-async-rewards", daemon=True).start()
        return self._loop


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
    if isinstance(function, str) or _is_model(function):
        name = function if isinstance(function, str) else function.config._name_or_path
        return name.rstrip("/").split("/")[-1] or type(function).__name__
    function = _unwrapped(function)
    return function.__name__ if inspect.isroutine(function) else type(function).__name__


def _is_model(function: Any) -> bool:
    return isinstance(function, nn.Module) and (isinstance(function, PreTrainedModel) or is_peft_model(function))


def _is_async(function: Callable) -> bool:
    function = _unwrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _unwrapped(function: Callable) -> Callable:
    return _unwrapped(function.func) if isinstance(function, functools.partial) else function


def _distinct(names: list[str]) -> list[str]:
    """Number the repetitions of a name, so that none hides another in the logs."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return distinct
