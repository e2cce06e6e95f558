"""What a run records of its steps: the metrics of a log, the line of the history, and that training has diverged."""

import math
import time
from dataclasses import asdict
from typing import Any

import numpy as np
from transformers import TrainerState
from transformers.utils import logging

from ..config import ESConfig
from ..evolution import EvolutionStrategy
from ..evolution.fitness import deviation, fitness, mean
from .history import STEP_SCALE
from .learning import Evaluation, Learning
from .metrics import average, completion_metrics, json_number
from .processes import Processes
from .run_history import RunHistory


logger = logging.get_logger(__name__)


class Recorder:
    """
    Records the steps of a run. Its methods are called in the order in which they stand here.

    Args:
        args ([`ESConfig`]):
            The config.
        processes ([`Processes`]):
            Those of the run.
        history ([`RunHistory`]):
            Gets a line for each update.
        reward_names (`list[str]`):
            Names of the reward functions.
    """

    def __init__(self, args: ESConfig, processes: Processes, history: RunHistory, reward_names: list[str]):
        self.args = args
        self.processes = processes
        self.history = history
        self.reward_names = reward_names
        self.diverged: str | None = None  # what is wrong with the weights
        self.last_checkpoint: str | None = None
        self._metrics: dict[str, Any] = {}  # of the step under way
        self._member_rewards: list[float | None] = []
        self._prompts: dict[str, Any] = {}  # rows of the step under way, for the history
        self._repeated: dict[str, Any] | None = None  # line of the step under way, if it was done before
        self._pending: list[dict[str, Any]] = []  # metrics of the steps since the last log
        self._learning = Learning()
        self._warned_of_equal_fitness = False

    def begin(self, updates: int) -> None:
        """Begin a run, or go on after so many updates."""
        self._pending = []
        self._learning.go_back(updates)

    def resume(self, checkpoint: str, steps: list[dict[str, Any]], updates: int, state: TrainerState) -> None:
        """Go on from a checkpoint: metrics of the `steps` of its history that are in no log will be in the next."""
        self.last_checkpoint, self.diverged = checkpoint, None
        logged = max((log["step"] for log in state.log_history if "loss" in log), default=0)
        # The history counts all updates, and the logs the steps of this call of train()
        logged += updates - state.global_step
        self._pending = [line["metrics"] for line in steps if line["step"] > logged]
        self._learning.resume(steps)

    def begin_step(self) -> None:
        """Begin to measure a step."""
        self._step_start = time.perf_counter()
        self._metrics = {"noise_seconds": 0.0}
        self._repeated = None
        self._prompts = {}

    def repeat(self, line: dict[str, Any]) -> float:
        """Take the step's line from before the run was interrupted. Returns the mean reward."""
        self._repeated = line
        reward = line["metrics"]["reward"]
        return math.nan if reward is None else reward

    def drawn(self, prompts: dict[str, Any], share: float) -> None:
        """
        Record which prompts were drawn, where settled ones are passed over.

        Args:
            prompts (`dict[str, Any]`):
                Their rows, and which of them are settled.
            share (`float`):
                Share of the dataset's rows that were known to be settled.
        """
        self._prompts = {"prompts": prompts}
        self._metrics["frac_settled_prompts"] = share

    def tried(self, metrics: dict[str, float]) -> None:
        """Record what was found about the length of the step; see [`AutoStep`]."""
        self._metrics |= metrics

    def evaluated(
        self, evaluation: Evaluation, utilities: np.ndarray, sigma: float, noise_seconds: float, step: int
    ) -> float:
        """
        Record what came of the members.

        Args:
            evaluation ([`Evaluation`]):
                Their rewards.
            utilities (`np.ndarray`):
                Shape `(members,)`.
            sigma (`float`):
                Standard deviation of their noise.
            noise_seconds (`float`):
                Time in which members got into the model.
            step (`int`):
                Number of the step.

        Returns:
            `float`: the mean reward.
        """
        if not utilities.any():
            self._warn_of_equal_fitness(step)
        by_member = fitness(evaluation.rewards, evaluation.members_per_prompt)
        self._member_rewards = [json_number(value) for value in by_member.tolist()]
        self._metrics |= completion_metrics(evaluation.summaries, self.reward_names)
        self._metrics |= self._learning.evaluated(evaluation, by_member, utilities)
        self._metrics |= {
            "sigma": sigma,
            "noise_seconds": noise_seconds,
            "reward": mean(by_member),
            "reward_std": deviation(by_member),
            "reward_max": float(np.nanmax(by_member, initial=-np.inf)),
            "reward_min": float(np.nanmin(by_member, initial=np.inf)),
        }
        return self._metrics["reward"]

    def _warn_of_equal_fitness(self, step: int) -> None:
        if not self._warned_of_equal_fitness:
            logger.warning(
                f"Step {step}: all members have the same fitness (or rewards for less than half of the prompts), so "
                "the weights stay as they are. If this goes on, use a reward that applies to all completions and "
                "tells them apart, more prompts or a larger sigma. (Shown once.)"
            )
            self._warned_of_equal_fitness = True

    def begin_update(self, optimizer: EvolutionStrategy) -> None:
        """Begin to measure the update."""
        self._update_record = optimizer.update_record
        self._metrics |= self._learning.updating(optimizer)
        if self.args.auto_step:
            self._metrics["step_scale"] = optimizer.step_scale
        self._update_start = time.perf_counter()

    def updated(self, optimizer: EvolutionStrategy, state: TrainerState, in_place: bool) -> None:
        """
        Record the update, now that it is done.

        Args:
            optimizer ([`EvolutionStrategy`]):
                It did the update.
            state ([`~transformers.TrainerState`]):
                Counts the steps before this one, and tokens.
            in_place (`bool`):
                Whether members were written into the weights.

        Raises:
            `FloatingPointError`: If weights are not finite any more.
        """
        self._metrics["update_seconds"] = time.perf_counter() - self._update_start
        self._measure_update(optimizer)
        if self.diverged is not None:
            raise self.divergence(self.diverged, state)
        self._metrics["step_time"] = time.perf_counter() - self._step_start
        self._metrics["num_tokens"] = state.num_input_tokens_seen
        metrics = {key: json_number(value) for key, value in self._metrics.items()}
        if self._repeated is not None:  # the history has it already
            metrics = self._repeated["metrics"]
        else:
            self.history.append(
                {
                    "step": optimizer.updates,
                    "global_step": state.global_step + 1,
                    **asdict(self._update_record),
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "sigma": optimizer.sigma,
                    **({STEP_SCALE: optimizer.step_scale} if self.args.auto_step else {}),
                    "in_place": in_place,
                    "rewards": self._member_rewards,
                    **self._prompts,
                    "metrics": metrics,
                }
            )
        self._pending.append(metrics)
        self._learning.done(metrics, optimizer.updates)

    def _measure_update(self, optimizer: EvolutionStrategy) -> None:
        """Norm of the update, distance from the start, and whether both and the weights are finite."""
        norms = (optimizer.update_norm, optimizer.distance_from_start(), optimizer.weight_norm())
        parts = [(*norms, optimizer.weights.not_finite())]
        if optimizer.weights.partitioned:
            parts = self.processes.exchange(lambda: parts[0])
        norms, distances, weights, broken = zip(*parts, strict=True)
        self._metrics["update_norm"] = math.hypot(*norms)
        self._metrics["relative_update_norm"] = self._metrics["update_norm"] / (math.hypot(*weights) or math.inf)
        self._metrics["distance_from_start"] = math.hypot(*distances)
        self._metrics |= self._learning.walked(self._metrics["update_norm"])
        if any(broken):
            self.diverged = f"The update made weights of `{next(filter(None, broken))}` NaN or infinite."
        elif not math.isfinite(self._metrics["update_norm"] + self._metrics["distance_from_start"]):
            self.diverged = "The update is not finite."

    def divergence(self, problem: str, state: TrainerState) -> FloatingPointError:
        """What to raise where weights or what is computed with them are not numbers any more."""
        way_out = "There is no checkpoint of this run from before."
        if self.last_checkpoint is not None:
            way_out = f"The last good checkpoint is {self.last_checkpoint}."
        return FloatingPointError(
            f"Step {state.global_step + 1}: {problem} Training has diverged. Lower `learning_rate` "
            f"({self.args.learning_rate}) or `sigma` ({self.args.sigma}){', or set bf16=True' * self.args.fp16}. "
            f"Nothing of this step was saved. {way_out}"
        )

    def complete(self, logs: dict[str, float]) -> bool:
        """
        Add the metrics of the steps since the last log, where `logs` are of steps or of all of training.

        Returns:
            `bool`: whether there were any.
        """
        if not self._pending or not ("loss" in logs or "train_runtime" in logs):
            return False
        logs.pop("grad_norm", None)  # there are no gradients
        logs.update(average(self._pending))
        logs["loss"] = -logs["reward"] if logs["reward"] is not None else None
        self._pending = []
        return True
