"""What is asked of members, and what they answer."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from ..rollout import Completion


@dataclass(frozen=True)
class Prompts:
    """
    What is asked of every member.

    Args:
        rows (`list[dict[str, Any]]`):
            The dataset's rows.
        ids (`list[list[int]]`):
            Tokens of their prompts.
        number (`int`):
            Completions of each prompt.
        seed (`int`):
            Seed of sampling, common to all members.
    """

    rows: list[dict[str, Any]]
    ids: list[list[int]]
    number: int
    seed: int


@dataclass(frozen=True)
class Result:
    """
    What one set of weights answered to the prompts, or to this process's share of them.

    Args:
        member (`int`):
            Number of the member in its population.
        prompts (`range`):
            Which of the prompts.
        rows (`list[dict[str, Any]]`):
            The row of each completion.
        completions (`list[Completion]`):
            Those of the first prompt, then of the second, and so on.
        num_tokens (`int`):
            Tokens of prompts and completions.
        seconds (`float`):
            Time of the generation.
        generated_by (`Hashable`):
            The process or server, of which several work side by side.
    """

    member: int
    prompts: range
    rows: list[dict[str, Any]]
    completions: list[Completion]
    num_tokens: int
    seconds: float
    generated_by: Hashable
