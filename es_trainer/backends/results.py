"""What is asked of members, and what they answer."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..rollout import Completion
from ..run.metrics import side_by_side


@dataclass(frozen=True)
class Prompts:
    """
    What is asked of the members: the same of all, or of each something of its own.

    Args:
        rows (`list[dict[str, Any]]`):
            The dataset's rows.
        ids (`list[list[int]]`):
            Tokens of their prompts.
        number (`int`):
            Completions of each prompt.
        seed (`int`):
            Seed of sampling, common to all members.
        members_per_prompt (`int`, *optional*):
            How many members have the same prompts: those that follow each other. If `None`, all of them.
        of_member (`int`, *optional*):
            How many of the prompts each of them has then: the first ones have the first.
    """

    rows: list[dict[str, Any]]
    ids: list[list[int]]
    number: int
    seed: int
    members_per_prompt: int | None = None
    of_member: int | None = None

    def shared_out(self, members: int, members_per_prompt: int | None) -> "Prompts":
        """The same, for so many members to have some each. The first ones are taken again for what is missing."""
        if members_per_prompt is None:
            return self
        askers = members // members_per_prompt
        of_member = -(-len(self.rows) // askers)
        taken = [i % len(self.rows) for i in range(askers * of_member)]
        rows, ids = [self.rows[i] for i in taken], [self.ids[i] for i in taken]
        return replace(self, rows=rows, ids=ids, members_per_prompt=members_per_prompt, of_member=of_member)

    def of(self, number: int) -> "Prompts":
        """Those of a member. The unperturbed weights, which come after the last one, have those of the first."""
        if self.members_per_prompt is None:
            return self
        first = number // self.members_per_prompt * self.of_member % len(self.rows)
        own = slice(first, first + self.of_member)
        return Prompts(self.rows[own], self.ids[own], self.number, self.seed)


@dataclass(frozen=True)
class Result:
    """
    What one set of weights answered to the prompts, or to this process's share of them.

    Args:
        number (`int`):
            Number of the member in its population, or of the batch in an evaluation.
        prompts (`range`):
            Which of its prompts.
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


# Completions, the number of tokens of each one's prompt, and further columns of each
Answer = tuple[list[Completion], list[int], list[dict[str, Any]]]


def results(
    numbers: Sequence[int],
    own: range,
    asked: Sequence[Prompts],
    answer: Answer,
    seconds: float,
    generated_by: Hashable,
) -> list[Result]:
    """
    What each of some members has answered.

    Args:
        numbers (`Sequence[int]`):
            Numbers of the members in their population.
        own (`range`):
            Which of their prompts they were asked.
        asked (`Sequence[Prompts]`):
            All prompts of each of them.
        answer (`Answer`):
            What they answered, one member after the other.
        seconds (`float`):
            Time of the generation, for each member.
        generated_by (`Hashable`):
            The process or server.
    """
    completions, prompt_tokens, columns = answer
    found = []
    for i, (number, prompts) in enumerate(zip(numbers, asked, strict=True)):
        rows = [prompts.rows[j] for j in own for _ in range(prompts.number)]
        part = slice(i * len(rows), (i + 1) * len(rows))
        mine = completions[part]
        num_tokens = sum(prompt_tokens[part]) + sum(completion.length for completion in mine)
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
