from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .text import completion_text


if TYPE_CHECKING:
    from evaluate import EvaluationModule


def evaluate_reward(
    metric: EvaluationModule | str,
    reference_column: str = "answer",
    score: str | None = None,
    **compute_kwargs: Any,
) -> Callable[..., list[float]]:
    """
    Turns a metric of the `evaluate` library into a reward function. Every completion is scored on its own, against
    the reference in its dataset row.

    Args:
        metric (`evaluate.EvaluationModule` or `str`):
            Metric object, or the name or path from which `evaluate.load` loads it.
        reference_column (`str`, *optional*, defaults to `"answer"`):
            Dataset column that holds the references.
        score (`str` or `None`, *optional*, defaults to `None`):
            Key of the metric's result to use as the reward. May be left out for a metric with a single result.
        **compute_kwargs:
            Passed on to the metric's `compute`, for instance `ignore_case=True`.

    Returns:
        `Callable[..., list[float]]`:
            Reward function, named after the metric: the trainer logs it as `rewards/<metric name>/mean`.

    Raises:
        ValueError: By the reward function, if the dataset has no column `reference_column`, if the metric's result
            has no key `score`, or if it has several keys and `score` was left out.

    Example:

    ```python
    reward = evaluate_reward("exact_match", reference_column="answer", ignore_case=True)
    ```
    """
    if isinstance(metric, str):
        import evaluate  # here because it takes seconds to import

        metric = evaluate.load(metric)

    def reward(completions: list[str | list[dict[str, str]]], **kwargs: Any) -> list[float]:
        if reference_column not in kwargs:
            raise ValueError(
                f"reference_column={reference_column!r} is not a column of the dataset: the reward "
                f"{metric.name!r} got {sorted(kwargs)}. Set `reference_column` to the column with the references."
            )
        results = [
            metric.compute(predictions=[completion_text(completion)], references=[reference], **compute_kwargs)
            for completion, reference in zip(completions, kwargs[reference_column], strict=True)
        ]
        return [_pick(result, score, metric.name) for result in results]

    reward.__name__ = metric.name
    return reward


def _pick(result: dict[str, Any], score: str | None, metric_name: str) -> float:
    if score is None and len(result) == 1:
        (score,) = result
    if score not in result:
        raise ValueError(
            f"score={score!r} does not name one result of the metric {metric_name!r}, which returns {sorted(result)}. "
            "Set `score` to one of these keys."
        )
    return float(result[score])
