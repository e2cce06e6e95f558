"""What came of prompts: completions and their scores."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from trl.data_utils import is_conversational

from .evolution.generations import prompt_rewards


@dataclass(frozen=True)
class Completion:
    """
    One completion.

    Args:
        ids (`list[int]`):
            Tokens, up to and with the end-of-sequence token.
        text (`str`):
            The decoded tokens without special ones.
        truncated (`bool`):
            Whether it was cut at the maximum length, and did not end there by itself.
        others (`int`, *optional*, defaults to `0`):
            How many of the tokens are not the model's own, but an environment's.
        messages (`list[dict[str, Any]]`, *optional*):
            The turns of a rollout in which tools were called: the model's answers and the tools' results.
        tool_calls (`list[bool]`, *optional*):
            Whether each call of a tool failed.
    """

    ids: list[int]
    text: str
    truncated: bool
    others: int = 0
    messages: list[dict[str, Any]] | None = None
    tool_calls: list[bool] | None = None

    @property
    def length(self) -> int:
        """Number of tokens that the model wrote."""
        return len(self.ids) - self.others


def for_rewards(completions: list[Completion], prompt: Any) -> list[Any]:
    """The completions as reward functions get them: messages if the prompts are conversational, like this one."""
    if not is_conversational({"prompt": prompt}):
        return [completion.text for completion in completions]
    return [completion.messages or [{"role": "assistant", "content": completion.text}] for completion in completions]


@dataclass(frozen=True)
class Scores:
    """
    Rewards of some completions.

    Args:
        by_function (`np.ndarray`):
            Shape `(completions, functions)`; NaN where a function does not apply.
        total (`np.ndarray`):
            Shape `(completions,)`; the weighted sum, NaN where no function applies.
        extra (`dict[str, list]`):
            Columns given to `log_extra`. Columns of the same name from different functions are numbered.
        metrics (`dict[str, list[float]]`):
            Values given to `log_metric`.
        seconds (`float`):
            Time that the functions took.
    """

    by_function: np.ndarray
    total: np.ndarray
    extra: dict[str, list[Any]]
    metrics: dict[str, list[float]]
    seconds: float


@dataclass(frozen=True)
class Generations:
    """
    How the completions of a prompt make its reward.

    Args:
        way (`str`):
            See [`~evolution.generations.prompt_rewards`].
        key (`Callable`, *optional*):
            Answer that a completion gives, for the majority. If `None`, its text.

    Raises:
        `TypeError`: If the key is no function.
        `ValueError`: If there is a key, but no majority.
    """

    way: str = "mean"
    key: Callable[[Any], Hashable] | None = None

    def __post_init__(self) -> None:
        if self.key is not None and not callable(self.key):
            raise TypeError(f"`majority_key` is {self.key!r}: give a function that returns a completion's answer.")
        if self.key is not None and self.way != "majority":
            raise ValueError(
                f"`majority_key` has no effect with generation_reward={self.way!r}: set generation_reward='majority'."
            )

    def keys(self, completions: list[Any], number: int) -> list[list[Hashable]] | None:
        """The answers of each prompt's completions, if they are of interest."""
        if self.way != "majority":
            return None
        key = self.key or _text
        found = [key(completion) for completion in completions]
        return [found[start : start + number] for start in range(0, len(found), number)]


def _text(completion: Any) -> str:
    return (completion if isinstance(completion, str) else completion[-1]["content"]).strip()


@dataclass(frozen=True)
class Rollout:
    """What came of one set of weights: completions of a batch of rows, and their scores."""

    rows: list[dict[str, Any]]  # the dataset's row of each completion
    completions: list[Completion]
    messages: list[Any]  # the completions as the reward functions got them
    scores: Scores
    num_tokens: int
    seconds: float  # of the generation
    generated_by: Hashable  # the process or server, of which several work side by side
    scored_by: Hashable

    def completion_rewards(self, mask_truncated: bool = False) -> np.ndarray:
        """
        Rewards of shape (1 + functions, completions): the total, and those of each function. NaN where a completion
        does not count.
        """
        rewards = np.vstack([self.scores.total, self.scores.by_function.T])
        truncated = np.array([completion.truncated for completion in self.completions])
        return np.where(truncated, np.nan, rewards) if mask_truncated else rewards

    def prompt_rewards(self, generations: Generations, number: int, mask_truncated: bool = False) -> np.ndarray:
        """Rewards of shape (1 + functions, prompts), of `number` completions of each prompt."""
        rewards = self.completion_rewards(mask_truncated)
        keys = generations.keys(self.messages, number)
        return np.array([prompt_rewards(of_all.reshape(-1, number), generations.way, keys) for of_all in rewards])
