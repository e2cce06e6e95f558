"""Metrics of `evaluate` as options name them: `evaluate:METRIC`, `evaluate:METRIC:SCORE,KEY=VALUE,...`."""

from dataclasses import dataclass
from pathlib import Path


PREFIX = "evaluate:"


@dataclass(frozen=True)
class MetricName:
    """
    Args:
        metric (`str`):
            Name or path of the metric.
        score (`str` or `None`):
            Name of the number that it computes.
        arguments (`dict[str, str]`):
            Arguments of `es_trainer.rewards.evaluate_reward`, as text.
    """

    metric: str
    score: str | None
    arguments: dict[str, str]

    @classmethod
    def parse(cls, name: str) -> "MetricName":
        """
        Raises:
            `ValueError`: If an argument has no value.
        """
        named, *arguments = name.removeprefix(PREFIX).split(",")
        for argument in arguments:
            if "=" not in argument:
                raise ValueError(
                    f"`reward_funcs` has {name!r}: {argument!r} is not `key=value`. Write arguments of "
                    "`es_trainer.rewards.evaluate_reward` like 'evaluate:f1,average=macro,reference_column=label'."
                )
        metric, _, score = named.partition(":")
        return cls(metric, score or None, dict(argument.split("=", 1) for argument in arguments))

    def runs_other_code(self) -> bool:
        """Whether this is more than a metric of `evaluate` itself: a file, somebody's on the Hub, a function."""
        is_of_evaluate = self.metric.isidentifier() and not Path(self.metric).exists()
        return not is_of_evaluate or "postprocess" in self.arguments
