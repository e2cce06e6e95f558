"""Calls reward functions by GRPOTrainer's protocol and checks what they return."""

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import replace
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from transformers.utils import logging

from ..choices import PASS_AT
from ..evolution.fitness import total_reward


if TYPE_CHECKING:
    from ..config import ESConfig
from ..rollout import Generations, Scores
from .call import Call
from .caller import Caller, CallSettings, Returned, unwrapped
from .scope import SCOPES


logger = logging.get_logger(__name__)

# What the trainer and Transformers' Trainer log themselves, of training and of evaluations (there after `eval_`)
RESERVED = frozenset(
    (
        *("loss", "reward", "reward_std", "reward_max", "reward_min", "learning_rate", "grad_norm"),
        *("epoch", "step", "num_tokens", "num_input_tokens_seen", "update_norm", "distance_from_start"),
        *("noise_seconds", "generation_seconds", "reward_seconds", "update_seconds", "step_time"),
        *("tokens_per_second", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"),
        *("train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"),
        *(
            "signal",
            "signal_low",
            "signal_high",
            "frac_reward_zero_std",
            "frac_settled_prompts",
            "reward/center",
            "sigma_cost",
            "sigma",
        ),
        *("expected_gain", "gain", "random_walk_distance", "relative_update_norm"),
        *("completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio"),
        *(f"completions/{name}_terminated_length" for name in ("mean", "min", "max")),
        *("tools/call_frequency", "tools/failure_frequency", "tools/turns"),
    )
)

TIMED_OUT = "timed_out"  # rewards/name/timed_out: share of a function's calls that took longer than its time limit

Rewards = Sequence[float | None]
# The name of a reward model, a reward model, or a function that returns a number for each completion
RewardFunc = str | PreTrainedModel | Callable[..., Rewards] | Callable[..., Awaitable[Rewards]]


class Scorer:
    """
    Scores completions with one or several reward functions and models.

    Functions are called in the thread that calls the scorer, one after another, or in a pool of processes. Those that
    are `async` run together in one event loop, which a thread of its own keeps for good. Where a function does not
    return, a warning says so after a minute.

    Args:
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            Functions are called with `prompts`, `completions`, `completion_ids`, every other column of the dataset,
            `trainer_state`, `log_extra(column, values)` and `log_metric(name, value)` as keyword arguments. Each
            returns a number for every completion, or `None` where it does not apply; or, if its attribute
            `reward_scope` is `"member"`, one for all of them: see [`per_member`]. Lists, dicts and sets that they
            get are their own, so they may change them; images, tensors and arrays are shared. Models, and names of
            models, are of sequence classification: see [`RewardModel`].
        weights (`list[float]`, *optional*):
            Weight of each function; 1.0 if not given.
        processing_classes ([`~transformers.PreTrainedTokenizerBase`] or `list`, *optional*):
            Tokenizer of each reward model; where it is `None`, it is loaded by the model's name. Entries of functions
            are ignored.
        of_environments (`Sequence[RewardFunc]`, *optional*):
            Further functions, with a weight of 1.
        generations ([`Generations`], *optional*):
            How the rewards of the completions of a prompt make that of the prompt.
        calls ([`CallSettings`], *optional*):
            How to call functions.

    Raises:
        `TypeError`: If a reward function cannot be called.
        `ValueError`: If there is no reward function, a `reward_scope` is unknown, or the number of weights or
            tokenizers is not that of the functions.
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | list[RewardFunc] | None,
        weights: list[float] | None = None,
        processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        of_environments: Sequence[RewardFunc] = (),
        generations: Generations | None = None,
        calls: CallSettings | None = None,
    ):
        if reward_funcs is None or reward_funcs == []:
            if not of_environments:
                raise ValueError(
                    f"`reward_funcs={reward_funcs}` is not valid: there is no reward to train on. Give a reward "
                    "function, a reward model or its name, or a list of them."
                )
            reward_funcs = []
        self.functions = list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
        for function in self.functions:
            other_module = isinstance(function, nn.Module) and not _is_model(function)
            if other_module or not (isinstance(function, str) or callable(function)):
                raise TypeError(
                    f"`reward_funcs` has {function!r}. Give a function `reward(completions, **kwargs)` that returns a "
                    "number for each completion, or a model of Transformers for sequence classification, or its name."
                )
        self.names = distinct([_name(function) for function in (*self.functions, *of_environments)])
        self.of_sets = np.array([_is_of_set(function) for function in (*self.functions, *of_environments)])
        if processing_classes is None:
            processing_classes = [None] * len(self.functions)
        self.processing_classes = (
            list(processing_classes) if isinstance(processing_classes, list) else [processing_classes]
        )
        for argument, values in (("reward_weights", weights), ("reward_processing_classes", self.processing_classes)):
            if values is not None and len(values) != len(self.functions):
                raise ValueError(
                    f"`{argument}` has {len(values)} entries for {len(self.functions)} reward functions "
                    f"({', '.join(self.names[: len(self.functions)])}): give one for each."
                )
        weights = [1.0] * len(self.functions) if weights is None else weights
        self.generations = generations or Generations()
        self.functions += of_environments
        self.processing_classes += [None] * len(of_environments)
        weights = [*weights, *[1.0] * len(of_environments)]
        self.weights = torch.tensor(weights, dtype=torch.float64, device="cpu")
        self._warned_of_unscored = False
        of_user = range(len(self.functions) - len(of_environments))  # environments are in this process
        self._caller = Caller(self.functions, self.names, self.of_sets, of_user, calls or CallSettings())

    @property
    def has_sets(self) -> bool:
        """Whether a reward is about all completions of a member."""
        return bool(self.of_sets.any())

    def _total(self, by_function: np.ndarray) -> np.ndarray:
        try:
            return total_reward(by_function, self.weights.numpy())
        except ValueError as error:
            raise ValueError(f"Reward functions {', '.join(self.names)}: {error}") from None

    def with_sets(self, scores: Scores, of_set: Scores) -> Scores:
        """Scores of some completions with the rewards that are about all of them, which `of_set` has."""
        by_function = np.where(self.of_sets, of_set.by_function[0], scores.by_function)
        metrics = {
            name: scores.metrics.get(name, []) + of_set.metrics.get(name, [])
            for name in (*scores.metrics, *of_set.metrics)
        }
        return replace(scores, by_function=by_function, total=self._total(by_function), metrics=metrics)

    def without_sets(self, rewards: np.ndarray, by_function: np.ndarray) -> np.ndarray:
        """
        The rewards without those that are about all completions of a member.

        Args:
            rewards (`np.ndarray`):
                Shape `(members, prompts)`.
            by_function (`np.ndarray`):
                Shape `(functions, members, prompts)`.

        Returns:
            `np.ndarray`: Shape `(members, prompts)`; NaN if there are no other rewards.
        """
        if not self.has_sets:
            return rewards
        others = by_function[~self.of_sets]
        weighted = others * self.weights.numpy()[~self.of_sets, None, None]
        return np.where(np.isnan(others).all(axis=0), np.nan, np.nansum(weighted, axis=0))

    def load_models(self, args: "ESConfig") -> None:
        """Load the reward models that are given by name, and put all of them on the device."""
        from .model import RewardModel

        for i, function in enumerate(self.functions):
            if isinstance(function, str) or _is_model(function):
                self.functions[i] = model = RewardModel(function, self.processing_classes[i], args)
                self.processing_classes[i] = model.tokenizer
        self._caller.check()

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
            `RuntimeError`: If a function raises, or exits.
            `ValueError`: If a function does not return one finite number or `None` for each completion, or logs
                another number of extra values or a metric that the trainer logs itself, or the weighted sum is larger
                than a float can be.
        """
        return self.begin(rows, completions, completion_ids, trainer_state)()

    def begin(
        self,
        rows: list[dict[str, Any]],
        completions: list[str] | list[list[dict[str, str]]],
        completion_ids: list[list[int]],
        trainer_state: TrainerState,
        which: np.ndarray | None = None,
    ) -> Callable[[], Scores]:
        """
        Call the functions, and leave those that are `async` running. What is returned waits for them and gives the
        scores. Those of one call at a time run, in the order of the calls. `which` says of each function whether to
        call it; others do not apply.
        """
        calls = {
            i: self._caller.call(
                name, rows=rows, completions=completions, completion_ids=completion_ids, trainer_state=trainer_state
            )
            for i, name in enumerate(self.names)
            if which is None or which[i]
        }
        finish = self._caller.begin(calls)

        def scores() -> Scores:
            return self._scores(rows, completions, calls, *finish())

        return scores

    def cancel(self) -> None:
        """Cancel the functions that are still running: nobody will ask for their rewards."""
        self._caller.cancel()

    def _scores(
        self,
        rows: list[dict[str, Any]],
        completions: list[Any],
        calls: dict[int, Call],
        returned: dict[int, Returned],
        seconds: float,
    ) -> Scores:
        extra: list[tuple[str, list[Any]]] = []
        metrics: dict[str, list[float]] = {}
        for i, call in calls.items():
            name = self.names[i]
            for column, values in call.extra.items():
                if len(values) != len(rows):
                    raise ValueError(
                        f"Reward function {name!r} gave `log_extra({column!r}, ...)` {len(values)} values for "
                        f"{len(rows)} completions: give one for each."
                    )
                extra.append((column, values))
            for metric, values in call.metrics.items():
                if self._is_logged(metric):
                    raise ValueError(
                        f"Reward function {name!r} gave `log_metric({metric!r}, ...)`, which the trainer logs itself: "
                        f"give the metric another name, such as {f'own/{metric}'!r}."
                    )
                metrics.setdefault(metric, []).extend(values)
        by_function = np.full((len(rows), len(self.functions)), np.nan)
        for i, one in returned.items():
            name, results = self.names[i], one.results
            if self.of_sets[i]:
                by_function[:, i] = _number_of_set(name, results[0])
            else:
                by_function[:, i] = _numbers(name, results, len(rows))
            if one.timed_out:
                metrics[f"rewards/{name}/{TIMED_OUT}"] = [float(late) for late in one.timed_out]
        unscored = np.flatnonzero(np.isnan(by_function).all(axis=1))
        if unscored.size and len(calls) == len(self.functions) and not self._warned_of_unscored:
            self._warned_of_unscored = True
            logger.warning(
                f"No reward function applies to some completions, for instance to {completions[unscored[0]]!r} of the "
                f"prompt {rows[unscored[0]]['prompt']!r}: they do not count. (Shown once.)"
            )
        total = self._total(by_function)
        names = distinct([column for column, _ in extra])
        return Scores(
            by_function,
            total,
            {name: values for name, (_, values) in zip(names, extra, strict=True)},
            metrics,
            seconds,
        )

    def _is_logged(self, metric: str) -> bool:
        """Whether logs have something else of that name."""
        metric = metric.removeprefix("eval_")
        of_functions = {f"rewards/{name}/{of}" for name in self.names for of in ("mean", "std", TIMED_OUT)}
        return metric in RESERVED or metric in of_functions or PASS_AT.fullmatch(metric) is not None


def _numbers(name: str, results: list[Any], count: int) -> list[float]:
    """Rewards of completions, for which a function was called once, or once for each."""
    of_call = count // len(results)
    rewards = [reward for result in results for reward in _list_of(name, result, of_call)]
    return [_number(name, reward, f"for completion {row}") for row, reward in enumerate(rewards)]


def _list_of(name: str, rewards: Any, count: int) -> list[Any]:
    try:
        # The order of a mapping or set, or what a text consists of, says nothing of completions
        if isinstance(rewards, str | Mapping | Set):
            raise TypeError
        rewards = list(rewards)
    except TypeError:
        raise ValueError(
            f"Reward function {name!r} returned {rewards!r} instead of a list of {count} numbers, one per completion. "
            "If it is one number for all completions, decorate the function with `es_trainer.rewards.per_member`."
        ) from None
    if len(rewards) != count:
        raise ValueError(
            f"Reward function {name!r} returned {len(rewards)} rewards for {count} completions: it must return one "
            "number (or None) for each."
        )
    return rewards


def _number_of_set(name: str, reward: Any) -> float:
    return _number(name, reward, "for all completions (it is one of `reward_scope = 'member'`)")


def _number(name: str, reward: Any, what_for: str) -> float:
    if reward is None:
        return math.nan
    value = reward
    if isinstance(value, torch.Tensor) and value.numel() == 1 or isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, Real | Decimal | np.bool_):
        try:
            value = float(value)
        except (OverflowError, ValueError):  # more than a float can be, or a Decimal that signals
            value = math.nan
        if math.isfinite(value):
            return value
    raise ValueError(
        f"Reward function {name!r} returned {_shortened(reward)} {what_for}: it must be a number that is finite as a "
        "float, or None where the reward does not apply."
    )


def _shortened(reward: Any) -> str:
    if isinstance(reward, int) and abs(reward) >= 10**300:  # Python refuses to print the largest ones
        return f"an integer of {reward.bit_length()} bits"
    return repr(reward)


def _name(function: RewardFunc) -> str:
    if isinstance(function, str) or _is_model(function):
        name = function if isinstance(function, str) else function.config._name_or_path
        return name.rstrip("/").split("/")[-1] or type(function).__name__
    function = unwrapped(function)
    return getattr(function, "__name__", type(function).__name__)  # as TRL names them


def _is_model(function: Any) -> bool:
    return isinstance(function, nn.Module) and (isinstance(function, PreTrainedModel) or is_peft_model(function))


def _is_of_set(function: RewardFunc) -> bool:
    """
    Raises:
        `ValueError`: If the function's `reward_scope` is unknown.
    """
    scope = getattr(unwrapped(function), "reward_scope", "completion")
    if scope not in SCOPES:
        raise ValueError(
            f"Reward function {_name(function)!r} has `reward_scope={scope!r}`: it is one of "
            f"{', '.join(map(repr, SCOPES))}."
        )
    return scope == "member"


def distinct(names: list[str]) -> list[str]:
    """Number the repetitions of a name, so that none hides another in the logs."""
    found: list[str] = []
    for name in names:
        number, unlike = 1, name
        while unlike in found:
            number += 1
            unlike = f"{name}_{number}"
        found.append(unlike)
    return found
