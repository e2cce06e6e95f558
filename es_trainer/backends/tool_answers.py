"""Completions by the engine, which calls tools while it answers."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl.data_utils import is_conversational

from ..agents import Conversation, Environments, Toolbox, ToolTemplate, begin
from ..agents.toolbox import ToolResult
from ..config import ESConfig
from ..copies import own_copy
from ..data import prompts as prompts_of
from ..engines import Engine
from ..engines.decoding import Row
from ..engines.sampling import derived_seed
from .answers import Answers
from .results import Answer, Prompts


class ToolAnswers(Answers):
    """
    Completions of several turns. The conversations of all members that are evaluated together go on together: each
    turn is one batch of those that still run.

    Args:
        args ([`ESConfig`]):
            The config.
        tools (`Sequence[Callable]`):
            Functions that the model may call.
        environments ([`Environments`], *optional*):
            What it acts in.
        progress (`bool`):
            Whether to show a bar of the tokens.
    """

    repeats = False

    def __init__(self, args: ESConfig, tools: Sequence[Callable], environments: Environments | None, progress: bool):
        super().__init__(args, progress)
        self.environments = environments
        self.splits = environments is None  # of which each server has those of its last call only
        self._toolboxes = {None: Toolbox(tools)} if environments is None else environments.toolboxes
        self._templates: dict[str | None, ToolTemplate] = {}

    def _environment_of(self, row: dict[str, Any]) -> str | None:
        return None if self.environments is None else self.environments.name_of(row)

    def _template(self, engine: Engine, environment: str | None) -> ToolTemplate:
        if environment not in self._templates:
            toolbox = self._toolboxes[environment]
            self._templates[environment] = ToolTemplate(
                engine.tokenizer, engine.images, toolbox.schemas, engine.chat_template_kwargs
            )
        return self._templates[environment]

    def check(self, engine: Engine, name: str, dataset: Any) -> None:
        for environment in self._toolboxes:
            self._template(engine, environment)
        if not isinstance(dataset, Dataset):
            return
        wanted = [None] * len(dataset)
        if self.environments is not None and self.environments.named:
            column = dataset["environment"] if "environment" in dataset.column_names else wanted
            wanted = [self.environments.name_of({"environment": environment}) for environment in column]
        lengths: list[int] = []
        for prompts in prompts_of(name, dataset):
            if not is_conversational({"prompt": prompts[0]}):
                raise ValueError(
                    f"`tools` and environments need conversational prompts, but those of `{name}` are texts. Give "
                    "lists of messages with 'role' and 'content'."
                )
            encoded = engine.encode(prompts, first_row=len(lengths))  # refuses what it cannot read
            self._keep_image_prompt(name, encoded)
            for prompt, environment in zip(prompts, wanted[len(lengths) :], strict=False):
                lengths.append(len(self._template(engine, environment).encode(prompt)))
        engine.check_lengths(lengths, conversational=True, name=name)

    def tokenize(self, engine: Engine, rows: list[dict[str, Any]]) -> list[list[int]]:
        ids = [self._template(engine, self._environment_of(row)).encode(row["prompt"]) for row in rows]
        engine.check_lengths([len(tokens) for tokens in ids], conversational=True)
        return ids

    def sizes(self, engine: Engine, prompts: Prompts) -> tuple[int, int | None]:
        tokens, rows = super().sizes(engine, prompts)
        return 2 * tokens, rows  # keys and values of a turn that has ended are kept for the next one

    def complete(
        self,
        engine: Engine,
        asked: Sequence[Prompts],
        own: Sequence[int],
        models: Sequence[str],
        members: Any,
        batch_size: int | None,
    ) -> Answer:
        seed, numbers = asked[0].seed, range(asked[0].number)
        rows = [Row(member, i, number) for member in range(len(models)) for i in own for number in numbers]
        with ThreadPoolExecutor() as threads:
            rollouts = self._begin(engine, asked, rows, threads)
            live, turn = rollouts, 0
            caches: dict[Any, Any] = {}
            while live:
                answers = engine.complete(
                    [rollout.conversation.all_ids for rollout in live],
                    [rollout.row for rollout in live],
                    _seed_of_turn(seed, turn),
                    members,
                    batch_size,
                    self.progress,
                    caches,
                )
                for rollout, answer in zip(live, answers, strict=True):
                    rollout.conversation.add_answer(answer)
                live = [rollout for rollout in live if rollout.conversation.pending]
                if turn == self.args.max_tool_calling_iterations:
                    break
                results = list(threads.map(Rollout.call, live))
                live = [
                    rollout
                    for rollout, result in zip(live, results, strict=True)
                    if rollout.conversation.add_results(result)
                ]
                turn += 1
        completions = [rollout.conversation.completion() for rollout in rollouts]
        prompt_tokens = [len(rollout.conversation.prompt_ids) for rollout in rollouts]
        return completions, prompt_tokens, [rollout.columns for rollout in rollouts]

    def _begin(
        self, engine: Engine, asked: Sequence[Prompts], rows: list[Row], threads: ThreadPoolExecutor
    ) -> list["Rollout"]:
        data = [asked[row.member].rows[row.prompt] for row in rows]
        names = [self._environment_of(of_row) for of_row in data]
        templates = [self._template(engine, name) for name in names]
        if self.environments is None:
            ids = [asked[row.member].ids[row.prompt] for row in rows]
            instances, messages = [None] * len(rows), [of_row["prompt"] for of_row in data]
        else:
            instances = self.environments.take(names, who=engine)
            messages = list(threads.map(begin, instances, own_copy(data), [self.environments.named] * len(data)))
            ids = [template.encode(prompt) for template, prompt in zip(templates, messages, strict=True)]
            engine.check_lengths(list(map(len, ids)), conversational=True, name="a step's data, with observations")
        return [
            Rollout(
                row,
                Conversation(tokens, template, engine.max_new_tokens, engine.context),
                prompt,
                instance,
                self._toolboxes[name],
            )
            for row, tokens, template, prompt, instance, name in zip(
                rows, ids, templates, messages, instances, names, strict=True
            )
        ]


@dataclass
class Rollout:
    """
    What one member does for one row.

    Args:
        row ([`Row`]):
            Which member and row it is.
        conversation ([`Conversation`]):
            What was said so far.
        prompt (`list[dict[str, Any]]`):
            The prompt, with the environment's observation.
        environment (`Any`, *optional*):
            The environment that it acts in.
        toolbox ([`Toolbox`]):
            The tools.
    """

    row: Row
    conversation: Conversation
    prompt: list[dict[str, Any]]
    environment: Any
    toolbox: Toolbox

    @property
    def columns(self) -> dict[str, Any]:
        """What reward functions get beside the dataset's columns."""
        return {} if self.environment is None else {"prompt": self.prompt, "environments": self.environment}

    def call(self) -> list[ToolResult]:
        """Do what the model has called for."""
        return self.toolbox.call(self.conversation.pending, self.environment)


def _seed_of_turn(seed: int, turn: int) -> int:
    """Seed of the random numbers of a turn, common to all members; that of the first turn is the step's."""
    return derived_seed("turn", seed, turn) if turn else seed
