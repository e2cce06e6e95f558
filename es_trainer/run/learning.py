"""Whether a run learns: what a step's rewards and the steps before say about the search."""

import math
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging

from ..evolution import EvolutionStrategy
from ..evolution.fitness import fitness, mean
from ..evolution.optimizer import UpdateRecord
from ..evolution.signal import expected_gain, signal
from .metrics import Summary


logger = logging.get_logger(__name__)

WINDOW = 10  # steps over which the signal is judged
WEAK_SIGNAL = 0.1


class Evaluation(NamedTuple):
    """
    What came of a population.

    Args:
        rewards (`np.ndarray`):
            Shape `(members, prompts)`, NaN where no completion counts.
        by_prompt (`np.ndarray`):
            The same without the rewards that are about all completions of a member.
        settled (`np.ndarray`):
            Shape `(all prompts,)`: whether all members that have a prompt were rewarded the same by the latter.
        compared (`np.ndarray`):
            By what the members are compared, of the shape of the rewards: these, or with
            `multi_objective_aggregation="normalize_then_sum"` those of functions that were brought to one scale.
        members_per_prompt (`int`, *optional*):
            How many members have the same prompts: those that follow each other. If `None`, all of them.
        center (`float`, *optional*):
            Mean reward of the unperturbed weights on the prompts of the first member, if they were evaluated.
        summaries (`list[Summary]`):
            What to log of the members, in their order.
        num_tokens (`int`):
            Tokens of all prompts and completions.
    """

    rewards: np.ndarray
    by_prompt: np.ndarray
    settled: np.ndarray
    compared: np.ndarray
    members_per_prompt: int | None
    center: float | None
    summaries: list[Summary]
    num_tokens: int


class Learning:
    """Follows whether the steps of a run have a signal, and what they gain."""

    def __init__(self) -> None:
        self._steps: list[dict[str, Any]] = []  # metrics of all steps of the run
        self._last: UpdateRecord | None = None  # of the last step, if its update is in the weights
        self._expected = math.nan  # gain of the step under way, for a learning rate of sigma
        self._warned = False

    def resume(self, steps: list[dict[str, Any]]) -> None:
        """Go on after these lines of the history."""
        self._steps = [line["metrics"] for line in steps]
        self._last = UpdateRecord.of_line(steps[-1]) if steps else None

    def go_back(self, updates: int) -> None:
        """Go on after so many updates, where the weights are."""
        if updates < len(self._steps):
            self._last = None
        del self._steps[updates:]

    def evaluated(self, evaluation: Evaluation, by_member: np.ndarray, utilities: np.ndarray) -> dict[str, float]:
        """What the rewards of a step say, from which fitness and utilities follow; docs/monitoring.md has each key."""
        metrics = {}
        together = evaluation.members_per_prompt
        # Or no reward is about a prompt, or nobody is compared on one
        if not np.isnan(evaluation.by_prompt).all() and together != 1:
            metrics["frac_reward_zero_std"] = float(evaluation.settled.mean())
        found = signal(evaluation.by_prompt, together)
        self._expected = expected_gain(by_member, found.reliability, utilities, step_length=1.0)
        if found.is_known:
            metrics |= {"signal": found.reliability, "signal_low": found.low, "signal_high": found.high}
        if evaluation.center is not None:
            metrics["reward/center"] = evaluation.center
            # By those that were asked the same
            metrics["sigma_cost"] = evaluation.center - mean(fitness(evaluation.rewards[:together]))
            before = self._steps[-1].get("reward/center") if self._steps else None
            if before is not None:
                metrics["gain"] = evaluation.center - before
        return metrics

    def updating(self, optimizer: EvolutionStrategy) -> dict[str, float]:
        """
        How the update lies to that of the last step, if they share noises, and what it should gain, if it is the plain
        sum of which this is known, and there is a signal.
        """
        metrics = {}
        last, self._last = self._last, optimizer.update_record
        if last is not None and not set(last.seeds).isdisjoint(self._last.seeds):
            metrics["update_cosine"] = last.cosine(self._last)
        if optimizer.rule == "sgd" and not math.isnan(self._expected):
            step_length = optimizer.step_scale * optimizer.param_groups[0]["lr"] / optimizer.sigma
            metrics["expected_gain"] = step_length * self._expected
        return metrics

    def walked(self, update_norm: float) -> dict[str, float]:
        """How far updates of the lengths of all steps would lead in random directions: their root of squares."""
        norms = (step["update_norm"] or 0.0 for step in self._steps)
        return {"random_walk_distance": math.hypot(update_norm, *norms)}

    def done(self, metrics: dict[str, Any], step: int) -> None:
        """A step is done, or done again, and these are its metrics. Warns once if there is no signal."""
        self._steps.append(metrics)
        signals = [step["signal"] for step in self._steps[-WINDOW:] if step.get("signal") is not None]
        weak = len(signals) == WINDOW and mean(np.array(signals)) < WEAK_SIGNAL
        if weak and not self._warned:
            logger.warning(
                f"Step {step}: signal {mean(np.array(signals)):.2f} over the last {WINDOW} steps. Members differ in "
                "reward by little else than luck: raise `num_prompts_per_step` or `population_size`, or set another "
                "`sigma` (docs/monitoring.md; shown once)."
            )
            self._warned = True
