"""Who completes prompts: the engine, or a function of the user."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import Trainer

from ..config import ESConfig
from ..data import prompts as prompts_of
from ..engines import Engine
from ..rollout import Completion
from .results import Prompts
from .rollout_func import RolloutFunc, call_rollout_func
from .trainer_inputs import TrainerInputs


class Answers:
    """
    Completions by the backend's engine.

    Args:
        args ([`ESConfig`]):
            The config.
        progress (`bool`):
            Whether to show a bar of the tokens.
    """

    by_engine = True
    has_prompts = True  # in the data, which the engine can answer by itself

    def __init__(self, args: ESConfig, progress: bool):
        self.args = args
        self.progress = progress

    def check(self, engine: Engine, name: str, dataset: Any) -> None:
        """Raise now what generation would raise about a prompt of a dataset."""
        if isinstance(dataset, Dataset):
            lengths: list[int] = []
            for batch in prompts_of(name, dataset):
                lengths += map(len, engine.encode(batch, first_row=len(lengths)))
            engine.check_lengths(lengths, conversational=isinstance(batch[0], list), name=name)

    def tokenize(self, engine: Engine, rows: list[dict[str, Any]]) -> list[list[int]]:
        """Tokens of the rows' prompts."""
        return engine.tokenize([row["prompt"] for row in rows])

    def sizes(self, engine: Engine, prompts: Prompts) -> tuple[int, int | None]:
        """Tokens of the longest row, as far as memory goes, and most rows at once (`None`: all of them)."""
        return max(map(len, prompts.ids)) + engine.max_new_tokens, self.args.generation_batch_size

    def complete(
        self,
        engine: Engine,
        prompts: Prompts,
        own: Sequence[int],
        models: Sequence[str],
        members: Any,
        batch_size: int | None,
    ) -> tuple[list[Completion], int, list[dict[str, Any]]]:
        """
        Complete this process's share of the prompts.

        Args:
            engine ([`Engine`]):
                Has the weights.
            prompts ([`Prompts`]):
                All prompts.
            own (`Sequence[int]`):
                Which of them are this process's.
            models (`Sequence[str]`):
                Names of the members, or of the weights as they are.
            members (`Any`):
                The group of members that is installed, or `None`.
            batch_size (`int`, *optional*):
                Most sequences generated at once.

        Returns:
            `tuple`: The completions, the number of tokens of the prompts, and further columns of each completion.
        """
        completions = engine.generate(prompts.ids, prompts.seed, prompts.number, members, batch_size, self.progress)
        return completions, sum(len(prompts.ids[i]) for i in own) * prompts.number, [{}] * len(completions)


class RolloutFuncAnswers(Answers):
    """
    Completions by a `rollout_func`.

    Args:
        args ([`ESConfig`]):
            The config.
        rollout_func (`Callable`):
            The function.
        trainer ([`~transformers.Trainer`]):
            What it is given beside the prompts.
    """

    by_engine = False
    has_prompts = False

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        """
        Raises:
            `ValueError`: If the config or what the trainer is given asks for something that a function cannot do.
        """
        if inputs.has_turns:
            raise ValueError(
                "`rollout_func` with `tools` or `environment_factory`: the function writes the turns of a "
                "conversation itself. Leave them out, and call tools there."
            )
        if args.num_generations_eval not in (None, args.num_generations):
            raise ValueError(
                f"`rollout_func` with `num_generations_eval={args.num_generations_eval}`: it could not tell "
                "evaluations from training. Leave `num_generations_eval` out."
            )

    def __init__(self, args: ESConfig, rollout_func: RolloutFunc, trainer: Trainer):
        super().__init__(args, progress=False)
        self.rollout_func = rollout_func
        self.trainer = trainer

    def check(self, engine, name, dataset):
        """The function makes tokens by itself."""

    def tokenize(self, engine, rows):
        return [[] for _ in rows]

    def complete(self, engine, prompts, own, models, members, batch_size):
        engine.reset_prefix_cache()
        asked = [prompts.rows[i]["prompt"] for i in own]
        return call_rollout_func(self.rollout_func, asked, self.trainer, prompts.number)
