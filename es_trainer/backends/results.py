"""What is asked of members, and what they answer."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..rollout import Completion
from ..run.metrics import side_by_side


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
        number (`int`):
            Number of the member in its population, or of the batch in an evaluation.
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

    number: int
    prompts: range
    rows: list[dict[str, Any]]
    completions: list[Completion]
    num_tokens: int
    seconds: float
    generated_by: Hashable

    @property
    def generations(self) -> int:
        """Completions of each prompt."""
        return len(self.completions) // len(self.prompts)


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


def joined(parts: Sequence[Result]) -> Result:
    """One result of all prompts, of results of the same weights that have some each."""
    generations = parts[0].generations
    found = [
        (prompt, part, slice(i * generations, (i + 1) * generations))
        for part in parts
        for i, prompt in enumerate(part.prompts)
    ]
    found.sort(key=lambda item: item[0])
    return Result(
        number=parts[0].number,
        prompts=range(len(found)),
        rows=[row for _, part, own in found for row in part.rows[own]],
        completions=[completion for _, part, own in found for completion in part.completions[own]],
        num_tokens=sum(part.num_tokens for part in parts),
        seconds=side_by_side((part.generated_by, part.seconds) for part in parts),
        generated_by="all of them",
    )


def one_after_another(batches: Sequence[Result]) -> Result:
    """One result of the prompts of all batches, of results of all prompts of each."""
    first, parts = 0, []
    for batch in batches:
        parts.append(replace(batch, prompts=range(first, first + len(batch.prompts))))
        first += len(batch.prompts)
    return joined(parts)
