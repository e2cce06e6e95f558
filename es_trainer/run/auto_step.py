"""Step lengths that are tried on held-out prompts."""

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
        Try the next step, and let this and the following ones have the length that is best. As long as half of it is
        better than that, it is halved again: the next trial might come too late.

        Args:
            optimizer ([`EvolutionStrategy`]):
                It was told how the members did. Its `step_scale` is changed.
            held_out_rewards (`Callable`):
                Evaluates the weights as they are: returns the rewards of the prompts, of shape `(prompts,)`.

        Returns:
            `dict[str, float]`: metrics: the mean reward after the step, and by how much it is higher after steps of
            half and double length, each with its standard error.
        """
        scale = optimizer.step_scale
        if scale != self._scale:  # of other weights, which were loaded
            self._follow({}, scale)
        rewards = _rewards_after(optimizer, scale, held_out_rewards)
        metrics = {"auto_step/reward": mean(rewards)}
        for name, length in LENGTHS.items():
            if 1 / MOST <= scale * length <= MOST:
                metrics |= _compared(name, _rewards_after(optimizer, scale * length, held_out_rewards), rewards)
        better = [name for name in LENGTHS if _is_better(name, [*self._trials, metrics])]
        if better == ["half"]:
            optimizer.step_scale = _halved(optimizer, held_out_rewards)
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


def _rewards_after(optimizer: EvolutionStrategy, scale: float, held_out_rewards: Rewards) -> np.ndarray:
    with optimizer.previewed(scale):
        return held_out_rewards()


def _compared(name: str, rewards: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """By how much rewards are higher than others of the same prompts, with the standard error of the mean."""
    difference = rewards - others
    difference = difference[~np.isnan(difference)]
    if len(difference) < 2:
        return {}
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return {f"auto_step/{name}": float(difference.mean()), f"auto_step/{name}_error": float(error)}


def _is_better(name: str, trials: list[dict[str, Any]]) -> bool:
    known = [trial for trial in trials if f"auto_step/{name}" in trial]
    gain = math.fsum(trial[f"auto_step/{name}"] for trial in known)
    return gain > CERTAIN * math.hypot(*(trial[f"auto_step/{name}_error"] for trial in known))


def _halved(optimizer: EvolutionStrategy, held_out_rewards: Rewards) -> float:
    """The first half of the step, half of that, ... than which the next is not better."""
    scale = optimizer.step_scale / 2
    rewards = _rewards_after(optimizer, scale, held_out_rewards)
    while scale / 2 >= 1 / MOST:
        shorter = _rewards_after(optimizer, scale / 2, held_out_rewards)
        if not _is_better("half", [_compared("half", shorter, rewards)]):
            break
        scale, rewards = scale / 2, shorter
    return scale
