from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .scope import SCOPES
from .text import completion_text


if TYPE_CHECKING:
    from evaluate import EvaluationModule


# Metrics of the library that say something of a set of predictions only, and little or nothing of one
OF_SETS = frozenset(
    (
        *("f1", "precision", "recall", "matthews_correlation", "roc_auc", "brier_score", "confusion_matrix"),
        *("pearsonr", "spearmanr", "r_squared", "mase", "smape"),
        *("bleu", "sacrebleu", "google_bleu", "nist_mt", "mauve", "seqeval", "squad_v2"),
    )
)


def evaluate_reward(
    metric: EvaluationModule | str,
    reference_column: str = "answer",
    score: str | None = None,
    scope: str | None = None,
    postprocess: Callable[[str], Any] | None = None,
    **compute_kwargs: Any,
) -> Callable[..., list[float] | float]:
    """
    Turns a metric of the `evaluate` library into a reward function.

    Args:
        metric (`evaluate.EvaluationModule` or `str`):
            Metric object, or the name or path from which `evaluate.load` loads it.
        reference_column (`str`, *optional*, defaults to `"answer"`):
            Dataset column that holds the references.
        score (`str` or `None`, *optional*, defaults to `None`):
            Key of the metric's result to use as the reward. May be left out for a metric with a single result.
        scope (`str`, *optional*):
            `"completion"`: each completion is scored on its own, against the reference in its dataset row.
            `"member"`: all completions of a member together; see [`per_member`]. If `None`, it is `"member"` for
            metrics that need a set, such as `"f1"` and `"sacrebleu"`, or else `"completion"`.
        postprocess (`Callable`, *optional*):
            Makes a prediction of a completion's text, for instance the number of a class. If `None`, it is the text.
        **compute_kwargs:
            Passed on to the metric's `compute`, for instance `average="macro"`.

    Returns:
        `Callable[..., list[float] | float]`:
            Reward function, named after the metric: the trainer logs it as `rewards/<metric name>/mean`.

    Raises:
        ValueError: If `scope` is unknown. By the reward function, if the dataset has no column `reference_column`, if
            the metric's result has no key `score`, or if it has several keys and `score` was left out.

    Example:

    ```python
    labels = ["negative", "neutral", "positive"]


    def to_label(text: str) -> int:
        words = [label for label in labels if label in text.lower()]
        return labels.index(words[0]) if words else len(labels)


    reward = evaluate_reward("f1", reference_column="label", postprocess=to_label, average="macro", labels=[0, 1, 2])
    ```
    """
    if isinstance(metric, str):
        import evaluate  # here because it takes seconds to import

        metric = evaluate.load(metric)
    if scope is None:
        scope = "member" if metric.name in OF_SETS else "completion"
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is not valid: choose one of {', '.join(map(repr, SCOPES))}.")

    def compute(completions: list[Any], references: list[Any]) -> float:
        texts = [completion_text(completion) for completion in completions]
        predictions = texts if postprocess is None else [postprocess(text) for text in texts]
        result = metric.compute(predictions=predictions, references=references, **compute_kwargs)
        return _pick(result, score, metric.name)

    def reward(completions: list[str | list[dict[str, str]]], **kwargs: Any) -> list[float] | float:
        if reference_column not in kwargs:
            raise ValueError(
                f"reference_column={reference_column!r} is not a column of the dataset: the reward "
                f"{metric.name!r} got {sorted(kwargs)}. Set `reference_column` to the column with the references."
            )
        references = kwargs[reference_column]
        if scope == "member":
            return compute(completions, references)
        pairs = zip(completions, references, strict=True)
        return [compute([completion], [reference]) for completion, reference in pairs]

    reward.__name__ = metric.name
    reward.reward_scope = scope
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
