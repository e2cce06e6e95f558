"""One call of a reward function: what it gets, what it logs, and how often it may be repeated."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import tenacity
from transformers import TrainerState
from transformers.utils import logging

from ..copies import own_copy


logger = logging.get_logger(__name__)

FIRST_WAIT = 1.0  # seconds before a function is called for the second time; then twice as long each time
LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class Retries:
    """
    Which exceptions of reward functions are followed by another call.

    Args:
        exceptions (`tuple[type[Exception]]`, *optional*):
            Their classes.
        times (`int`, *optional*, defaults to `0`):
            Most further calls.
    """

    exceptions: tuple[type[Exception], ...] = ()
    times: int = 0

    def settings(self, name: str) -> dict[str, Any]:
        """What Tenacity has to know. Waiting grows exponentially, with jitter: other callers wait, too."""

        def say(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception()
            logger.warning(
                f"Reward function {name!r} raised {type(error).__name__}: {error}. It is called again in "
                f"{state.next_action.sleep:.1f} seconds ({state.attempt_number} of {self.times} times)."
            )

        return {
            "retry": tenacity.retry_if_exception_type(self.exceptions),
            "stop": tenacity.stop_after_attempt(1 + self.times),
            "wait": tenacity.wait_exponential(FIRST_WAIT, LONGEST_WAIT) + tenacity.wait_random(0, FIRST_WAIT),
            "before_sleep": say,
            "reraise": True,
        }


@dataclass
class Outcome:
    """
    What became of a call.

    Args:
        result (`Any`):
            What the function returned, or what counts in its place.
        start (`float`), end (`float`):
            When it ran, on the clock of `time.perf_counter`, which the processes of a machine share.
        extra (`dict[str, list]`, *optional*), metrics (`dict[str, list[float]]`, *optional*):
            What it logged.
        timed_out (`bool`, *optional*, defaults to `False`):
            Whether it was ended by its time limit.
        raised (`str`, *optional*):
            Name and message of the exception that another process cannot raise here, if there was one.
        where (`str`, *optional*):
            Its traceback.
    """

    result: Any
    start: float
    end: float
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    timed_out: bool = False
    raised: str | None = None
    where: str = ""


@dataclass
class Call:
    """
    What one function gets for some completions, and what it logs meanwhile.

    Args:
        name (`str`):
            Of the function.
        rows (`list[dict[str, Any]]`):
            The dataset's row of each completion.
        completions (`list`):
            Texts, or lists of messages.
        completion_ids (`list[list[int]]`):
            Their tokens.
        trainer_state ([`~transformers.TrainerState`]):
            Passed on.
        retries ([`Retries`], *optional*):
            When to call the function again.
    """

    name: str
    rows: list[dict[str, Any]]
    completions: list[Any]
    completion_ids: list[list[int]]
    trainer_state: TrainerState | None
    retries: Retries = field(default_factory=Retries)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def of_each_completion(self) -> list["Call"]:
        """A call for each of the completions."""
        return [
            Call(self.name, [row], [completion], [ids], self.trainer_state, self.retries)
            for row, completion, ids in zip(self.rows, self.completions, self.completion_ids, strict=True)
        ]

    def take_logs(self, outcomes: Sequence[Outcome]) -> None:
        """
        Log what was logged by calls for each of the completions, in their order, or by this one. A call that was ended
        has `None` in the columns of the others.
        """
        columns = dict.fromkeys(column for outcome in outcomes for column in outcome.extra)
        self.extra = {
            column: [
                value
                for outcome in outcomes
                for value in outcome.extra.get(column, [None] if outcome.timed_out else [])
            ]
            for column in columns
        }
        metrics = dict.fromkeys(metric for outcome in outcomes for metric in outcome.metrics)
        self.metrics = {
            metric: [value for outcome in outcomes for value in outcome.metrics.get(metric, [])] for metric in metrics
        }

    def run(self, function: Callable) -> Any:
        """Call the function."""
        return tenacity.Retrying(**self.retries.settings(self.name))(lambda: _listed(function(**self._keywords())))

    async def run_async(self, function: Callable[..., Awaitable]) -> Any:
        """Call a function that is async."""

        async def once() -> Any:
            return _listed(await function(**self._keywords()))

        return await tenacity.AsyncRetrying(**self.retries.settings(self.name))(once)

    def __str__(self) -> str:
        count = len(self.completions)
        which = "the completion" if count == 1 else f"{count} completions, the first"
        return f"{which} {_shortened(self.completions[0])} of the prompt {_shortened(self.rows[0]['prompt'])}"

    def _keywords(self) -> dict[str, Any]:
        """What the function gets, of its own: also what an earlier attempt changed and logged is forgotten."""
        self.extra.clear()
        self.metrics.clear()
        rows = self.rows
        return {
            **{key: [own_copy(row[key]) for row in rows] for key in rows[0] if key not in ("prompt", "completion")},
            "prompts": [own_copy(row["prompt"]) for row in rows],
            "completions": own_copy(self.completions),
            "completion_ids": [list(ids) for ids in self.completion_ids],
            "trainer_state": self.trainer_state,
            "log_extra": self._log_extra,
            "log_metric": self._log_metric,
        }

    def _log_extra(self, column: str, values: Sequence[Any]) -> None:
        self.extra.setdefault(str(column), []).extend(values)

    def _log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))


def _listed(rewards: Any) -> Any:
    return list(rewards) if isinstance(rewards, Iterator) else rewards


def _shortened(message: Any, length: int = 80) -> str:
    """The end of a text, or of the last of some messages: prompts often begin alike."""
    if isinstance(message, list) and message and isinstance(message[-1], dict):
        message = message[-1].get("content", message[-1])
    text = message if isinstance(message, str) else str(message)
    return repr(text if len(text) <= length else "…" + text[-length:])
