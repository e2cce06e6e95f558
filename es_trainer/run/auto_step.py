"""Step lengths that are tried on held-out prompts."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..evolution import EvolutionStrategy
from ..evolution.fitness import mean
from .history import STEP_SCALE


LENGTHS = {"half": 0.5, "double": 2.0}
MOST = 16.0  # times the learning rate; the least is 1 / MOST of it
CERTAIN = 1.645  # standard errors: one change in twenty is luck where lengths do not differ
HARM = 3.0  # standard errors: of what is judged by a single trial, at each of them
WINDOW = 20  # trials: what was found long ago is of other weights

Rewards = Callable[[], np.ndarray]


class AutoStep:
    """
    Tries steps at half and double length beside their own. One step changes few completions, so what is found is added
    up over the trials until it says that another length is better.
    """

    def __init__(self) -> None:
        self._scale = 1.0
        self._trials: list[dict[str, float]] = []  # metrics of the steps since the scale was changed last

    def choose(self, optimizer: EvolutionStrategy, held_out_rewards: Rewards) -> dict[str, float]:
        """
        Try the next step, and let this and the following ones have the length that is best.

        A step that makes rewards worse is halved until it does not: the next trial might come too late.

        Args:
            optimizer ([`EvolutionStrategy`]):
                It was told how the members did. Its `step_scale` is changed.
            held_out_rewards (`Callable`):
                Evaluates the weights as they are: returns the rewards of the prompts, of shape `(prompts,)`.

        Returns:
            `dict[str, float]`: metrics: the mean reward after the step, and by how much it is higher than without the
            step, and after steps of half and double length, each with its standard error.
        """
        scale = optimizer.step_scale
        if scale != self._scale:  # of other weights, which were loaded
            self._follow({}, scale)

        @functools.cache
        def rewards_after(scale: float) -> np.ndarray:
            with optimizer.previewed(scale):
                return held_out_rewards()

        before, rewards = held_out_rewards(), rewards_after(scale)
        metrics = {"auto_step/reward": mean(rewards), **_compared("gain", rewards, before)}
        for name, length in LENGTHS.items():
            if 1 / MOST <= scale * length <= MOST:
                metrics |= _compared(name, rewards_after(scale * length), rewards)
        better = [name for name in LENGTHS if _is_better(name, [*self._trials, metrics])]
        if scale > 1 / MOST and (_harms(rewards, before) or better == ["half"]):
            optimizer.step_scale = _halved(scale / 2, before, rewards_after)
        elif better:  # also if both are: a longer step has more to say
            optimizer.step_scale = 2 * scale
        self._follow(metrics, optimizer.step_scale)
        return metrics

    def repeat(self, lines: Iterable[dict[str, Any]]) -> None:
        """Follow steps that were done before, of which the history has these lines."""
        for line in lines:
            if "auto_step/reward" in line["metrics"]:
                self._follow(line["metrics"], line[STEP_SCALE])

    def _follow(self, metrics: dict[str, Any], scale: float) -> None:
        self._trials = [*self._trials, metrics][1 - WINDOW :] if scale == self._scale else []
        self._scale = scale


def _compared(name: str, rewards: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """By how much rewards are higher than others of the same prompts, with the standard error of the mean."""
    difference = rewards - others
    difference = difference[~np.isnan(difference)]
    if len(difference) < 2:
        return {}
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return {f"auto_step/{name}": float(difference.mean()), f"auto_step/{name}_error": float(error)}


def _is_better(name: str, trials: list[dict[str, Any]], errors: float = CERTAIN) -> bool:
    known = [trial for trial in trials if f"auto_step/{name}" in trial]
    gain = math.fsum(trial[f"auto_step/{name}"] for trial in known)
    return gain > errors * math.hypot(*(trial[f"auto_step/{name}_error"] for trial in known))


def _harms(rewards: np.ndarray, before: np.ndarray) -> bool:
    if np.isnan(rewards).all():  # no completion counts any more
        return not np.isnan(before).all()
    return _is_better("before", [_compared("before", before, rewards)], HARM)


def _halved(scale: float, before: np.ndarray, rewards_after: Callable[[float], np.ndarray]) -> float:
    """The first of this scale, half of it, ... that does not make rewards worse, and than which half is no better."""
    rewards = rewards_after(scale)
    while scale / 2 >= 1 / MOST:
        shorter = rewards_after(scale / 2)
        if not _harms(rewards, before) and not _is_better("half", [_compared("half", shorter, rewards)]):
            break
        scale, rewards = scale / 2, shorter
    return scale
