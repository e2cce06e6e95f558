"""What is asked of members, and what they answer."""

from collections.abc import Hashable, Sequence
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


# Completions, the number of tokens of their prompts for one member, and further columns of each completion
Answer = tuple[list[Completion], int, list[dict[str, Any]]]


def results(
    numbers: Sequence[int], own: range, prompts: Prompts, answer: Answer, seconds: float, generated_by: Hashable
) -> list[Result]:
    """
    What each of some members has answered.

    Args:
        numbers (`Sequence[int]`):
            Numbers of the members in their population.
        own (`range`):
            Which of the prompts they were asked.
        prompts ([`Prompts`]):
            All prompts.
        answer (`Answer`):
            What they answered, one member after the other.
        seconds (`float`):
            Time of the generation, for each member.
        generated_by (`Hashable`):
            The process or server.
    """
    completions, prompt_tokens, columns = answer
    rows = [prompts.rows[i] for i in own for _ in range(prompts.number)]
    found = []
    for i, number in enumerate(numbers):
        part = slice(i * len(rows), (i + 1) * len(rows))
        mine = completions[part]
        num_tokens = prompt_tokens + sum(completion.length for completion in mine)
        of_member = [{**row, **extra} for row, extra in zip(rows, columns[part], strict=True)]
        found.append(Result(number, own, of_member, mine, num_tokens, seconds, generated_by))
    return found
