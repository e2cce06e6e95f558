"""What is logged about completions, under GRPOTrainer's names, from a few numbers for each member."""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..evolution.fitness import deviation, mean
from ..evolution.generations import pass_at, tries
from ..rollout import Rollout


# Metrics of which a log shows the last value instead of the mean since the last log
LAST_VALUE = ("num_tokens", "distance_from_start", "random_walk_distance")


class Moments(NamedTuple):
    """Number, mean and standard deviation of values."""

    count: int
    mean: float
    deviation: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Moments":
        """Those of the numbers that count (not NaN)."""
        return cls(int(np.count_nonzero(~np.isnan(values))), mean(values), deviation(values))

    @classmethod
    def of_all(cls, parts: Iterable["Moments"]) -> "Moments":
        """Those of the values of all parts (Chan et al., 1979). They are infinite where a float cannot hold them."""
        parts = [part for part in parts if part.count]
        count = sum(part.count for part in parts)
        if not count:
            return cls(0, math.nan, math.nan)
        center = sum(part.count / count * part.mean for part in parts)
        shares = [math.sqrt(part.count / count) for part in parts]
        within = [share * part.deviation for share, part in zip(shares, parts, strict=True)]
        between = [share * (part.mean - center) for share, part in zip(shares, parts, strict=True)]
        return cls(count, center, math.hypot(*within, *between))


class Summary(NamedTuple):
    """The few numbers about a rollout that processes tell each other."""

    rewards: list[float]  # of the prompts; NaN where no completion counts
    by_function: list[list[float]]  # of each reward function, the same
    functions: list[Moments]  # of each reward function
    completions: int
    truncated: int
    tokens: int  # of the completions
    shortest: int
    longest: int
    ended: list[int] | None  # tokens, shortest and longest of the completions that were not truncated
    num_tokens: int  # with the prompts
    own: dict[str, Moments]  # what reward functions gave to `log_metric`
    generation_seconds: float
    generated_by: Hashable
    reward_seconds: float
    scored_by: Hashable

    def share(self, count: int) -> "Summary":
        """That of one of `count` parts of a rollout that were made at the same time, one in each process."""
        seconds = {
            "generation_seconds": self.generation_seconds / count,
            "reward_seconds": self.reward_seconds / count,
        }
        return self._replace(**seconds, generated_by="all processes", scored_by="all processes")


def summarize(rollout: Rollout, rewards: np.ndarray) -> Summary:
    """
    Args:
        rollout ([`Rollout`]):
            Completions and their scores.
        rewards (`np.ndarray`):
            What `prompt_rewards` returned.
    """
    lengths = [completion.length for completion in rollout.completions]
    ended = [completion.length for completion in rollout.completions if not completion.truncated]
    return Summary(
        rewards=rewards[0].tolist(),
        by_function=rewards[1:].tolist(),
        functions=[Moments.of(column) for column in rollout.scores.by_function.T],
        completions=len(lengths),
        truncated=sum(completion.truncated for completion in rollout.completions),
        tokens=sum(lengths),
        shortest=min(lengths),
        longest=max(lengths),
        ended=[sum(ended), min(ended), max(ended)] if ended else None,
        num_tokens=rollout.num_tokens,
        own={name: Moments.of(np.array(values)) for name, values in _own_metrics(rollout).items()},
        generation_seconds=rollout.seconds,
        generated_by=rollout.generated_by,
        reward_seconds=rollout.scores.seconds,
        scored_by=rollout.scored_by,
    )


def _own_metrics(rollout: Rollout) -> dict[str, list[float]]:
    """What reward functions gave to `log_metric`, how often tools were called and failed, and the model's turns."""
    if rollout.completions[0].tool_calls is None:
        return rollout.scores.metrics
    calls = [completion.tool_calls or [] for completion in rollout.completions]
    turns = [
        sum(message["role"] == "assistant" for message in completion.messages) for completion in rollout.completions
    ]
    return rollout.scores.metrics | {
        "tools/turns": list(map(float, turns)),
        "tools/call_frequency": [float(len(of_one)) for of_one in calls],
        "tools/failure_frequency": [float(failed) for of_one in calls for failed in of_one],
    }


def pass_metrics(rollout: Rollout, number: int) -> dict[str, Moments]:
    """
    `pass@k` over the prompts, of `number` completions of each, for k = 1, 2, 4, ... and `number`; see [`pass_at`].
    Nothing if there is one completion of each.
    """
    if number == 1:
        return {}
    rewards = rollout.scores.total.reshape(-1, number)
    return {f"pass@{k}": Moments.of(np.array([pass_at(of_prompt, k) for of_prompt in rewards])) for k in tries(number)}


def side_by_side(times: Iterable[tuple[Hashable, float]]) -> float:
    """Seconds that some pieces of work took together, given who did each, and in how many seconds."""
    doers, seconds = zip(*times, strict=True)
    return sum(seconds) / len(set(doers))


def completion_metrics(summaries: Sequence[Summary], names: Sequence[str]) -> dict[str, float]:
    """
    Metrics over all completions.

    Args:
        summaries (`Sequence[Summary]`):
            Of the rollouts, in an order that does not depend on who made them.
        names (`Sequence[str]`):
            Names of the reward functions.
    """
    metrics = {}
    for i, name in enumerate(names):
        moments = Moments.of_all(summary.functions[i] for summary in summaries)
        metrics[f"rewards/{name}/mean"] = moments.mean
        metrics[f"rewards/{name}/std"] = moments.deviation
    for name in dict.fromkeys(name for summary in summaries for name in summary.own):
        metrics[name] = Moments.of_all(summary.own[name] for summary in summaries if name in summary.own).mean
    completions = sum(summary.completions for summary in summaries)
    tokens = sum(summary.tokens for summary in summaries)
    truncated = sum(summary.truncated for summary in summaries)
    # Zeros if none has ended, as with GRPOTrainer
    ended = [summary.ended for summary in summaries if summary.ended is not None] or [[0, 0, 0]]
    ended_tokens, shortest, longest = zip(*ended, strict=True)
    seconds = side_by_side((summary.generated_by, summary.generation_seconds) for summary in summaries)
    return metrics | {
        "completions/mean_length": tokens / completions,
        "completions/min_length": float(min(summary.shortest for summary in summaries)),
        "completions/max_length": float(max(summary.longest for summary in summaries)),
        "completions/clipped_ratio": truncated / completions,
        "completions/mean_terminated_length": sum(ended_tokens) / max(completions - truncated, 1),
        "completions/min_terminated_length": float(min(shortest)),
        "completions/max_terminated_length": float(max(longest)),
        "tokens_per_second": tokens / seconds,
        "generation_seconds": seconds,
        "reward_seconds": side_by_side((summary.scored_by, summary.reward_seconds) for summary in summaries),
    }


def json_number(value: float) -> float | None:
    """JSON knows no NaN and no infinity."""
    return value if np.isfinite(value) else None


def average(steps: list[dict[str, Any]]) -> dict[str, float | None]:
    """What a log shows of several steps' metrics."""
    averages: dict[str, float | None] = {}
    for key in dict.fromkeys(key for step in steps for key in step):
        values = [step[key] for step in steps if step.get(key) is not None]
        if key in LAST_VALUE:
            averages[key] = values[-1] if values else None
        else:
            averages[key] = json_number(mean(np.array(values, dtype=np.float64))) if values else None
    return averages
