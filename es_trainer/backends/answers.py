"""Who completes prompts: the engine, or a function of the user."""

import itertools
import threading
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Trainer

from ..config import ESConfig
from ..data import collate, image_columns
from ..data import prompts as prompts_of
from ..engines import Engine
from ..engines.decoding import Row
from ..engines.image_prompts import ImagePrompt
from ..engines.sampling import derived_seed
from ..fields import require
from .results import Answer, Prompts
from .rollout_func import RolloutFunc, call_rollout_func
from .trainer_inputs import TrainerInputs


IMAGES_AT_ONCE = 32  # rows with images that are in memory together


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
    no_images: str | None = None  # why images are refused, and the way out
    splits = True  # whether the prompts of a member can be shared out, for the same answers
    repeats = True  # whether a member can be asked twice at the same time: nothing comes of it but tokens

    def __init__(self, args: ESConfig, progress: bool):
        self.args = args
        self.progress = progress
        self.image_prompt: ImagePrompt | None = None  # one of those to train on, if they have images

    def check(self, engine: Engine, name: str, dataset: Any) -> None:
        """Raise now what generation would raise about a prompt of a dataset."""
        if isinstance(dataset, Dataset):
            lengths: list[int] = []
            size = IMAGES_AT_ONCE if image_columns(dataset) else 1000
            with tqdm(
                total=len(dataset), desc=f"Prompts of {name}", leave=False, delay=5, disable=not self.progress
            ) as bar:
                for batch in prompts_of(name, dataset, size):
                    encoded = engine.encode(batch, first_row=len(lengths))
                    lengths += map(len, encoded)
                    bar.update(len(batch))
                    self._keep_image_prompt(name, encoded)
            engine.check_lengths(lengths, conversational=isinstance(batch[0], list), name=name)
        elif dataset is not None and engine.images is not None:
            # Of a stream, the first prompt says whether there are images
            self._keep_image_prompt(name, self.tokenize(engine, collate(list(itertools.islice(dataset, 1)), name)))

    def _keep_image_prompt(self, name: str, prompts: list[list[int]]) -> None:
        if name == "train_dataset" and self.image_prompt is None:
            self.image_prompt = next((prompt for prompt in prompts if isinstance(prompt, ImagePrompt)), None)

    def tokenize(self, engine: Engine, rows: list[dict[str, Any]]) -> list[list[int]]:
        """Tokens of the rows' prompts."""
        return engine.tokenize([row["prompt"] for row in rows])

    def sizes(self, engine: Engine, prompts: Prompts) -> tuple[int, int | None]:
        """Tokens of the longest row, as far as memory goes, and most rows at once (`None`: all of them)."""
        return max(map(len, prompts.ids)) + engine.max_new_tokens, self.args.generation_batch_size

    def generate(self, prompts: list[Any], num_generations: int) -> list[dict[str, Any]]:
        """
        Raises:
            `RuntimeError`: As there is no `rollout_func` that asks.
        """
        raise RuntimeError("`trainer.generate` is for a `rollout_func`: the trainer was made without one.")

    def complete(
        self,
        engine: Engine,
        asked: Sequence[Prompts],
        own: Sequence[int],
        models: Sequence[str],
        members: Any,
        batch_size: int | None,
    ) -> Answer:
        """
        Complete this process's share of the prompts.

        Args:
            engine ([`Engine`]):
                Has the weights.
            asked (`Sequence[Prompts]`):
                All prompts of each member.
            own (`Sequence[int]`):
                Which of them are this process's.
            models (`Sequence[str]`):
                Names of the members, or of the weights as they are.
            members (`Any`):
                The group of members that is installed, or `None`.
            batch_size (`int`, *optional*):
                Most sequences generated at once.

        Returns:
            `tuple`: The completions, the number of tokens of each one's prompt, and further columns of each.
        """
        ids, seed, number = [prompts.ids for prompts in asked], asked[0].seed, asked[0].number
        completions = engine.generate_each(ids, seed, number, members, batch_size, self.progress)
        prompt_tokens = [len(of_member[i]) for of_member in ids for i in own for _ in range(number)]
        return completions, prompt_tokens, [{}] * len(completions)


class Generating(threading.local):
    """
    Who generates for the `rollout_func` that is called in this thread: an engine, which member of a group, and the
    seed of the next call.
    """

    engine: Engine | None = None
    member: int = 0
    members: Any = None
    seed: int = 0
    calls: int = 0


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
    no_images = "`rollout_func` makes the prompts' tokens by itself. Leave it out"
    splits = False
    repeats = False

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
        require(
            args,
            args.eval_kl_prompts == 0,
            "eval_kl_prompts",
            "`rollout_func` makes the prompts' tokens by itself, so there are none to compare distributions on. Set "
            "it to 0.",
        )

    def __init__(self, args: ESConfig, rollout_func: RolloutFunc, trainer: Trainer):
        super().__init__(args, progress=False)
        self.rollout_func = rollout_func
        self.trainer = trainer
        self._generating = Generating()

    def check(self, engine, name, dataset):
        """The function makes tokens by itself."""

    def tokenize(self, engine, rows):
        return [[] for _ in rows]

    def complete(self, engine, asked, own, models, members, batch_size):
        engine.reset_prefix_cache()
        now = self._generating
        completions, columns, prompt_tokens = [], [], []
        try:
            for now.member, prompts in enumerate(asked):
                now.engine, now.members, now.seed, now.calls = engine, members, prompts.seed, 0
                mine = [prompts.rows[i]["prompt"] for i in own]
                made, tokens, fields = call_rollout_func(self.rollout_func, mine, self.trainer, prompts.number)
                completions += made
                columns += fields
                prompt_tokens += tokens
        finally:
            now.engine = now.members = None
        return completions, prompt_tokens, columns

    def generate(self, prompts: list[Any], num_generations: int) -> list[dict[str, Any]]:
        """
        Complete prompts with the weights of the member for which this thread calls the function.

        Args:
            prompts (`list`):
                Texts or lists of messages.
            num_generations (`int`):
                Completions per prompt.

        Returns:
            `list[dict[str, Any]]`: the `"prompt_ids"`, `"completion_ids"` and `"text"` of each completion of the first
            prompt, then of the second, and so on.

        Raises:
            `RuntimeError`: If this thread does not call the function.
        """
        now = self._generating
        if now.engine is None:
            raise RuntimeError(
                "`trainer.generate` was called outside of the `rollout_func`, or in another thread: it would not be "
                "known which member answers."
            )
        ids = now.engine.tokenize(prompts)
        now.calls += 1
        seed = derived_seed("generate", now.seed, now.calls)
        rows = [Row(now.member, i, number) for i in range(len(ids)) for number in range(num_generations)]
        of_rows = [ids[row.prompt] for row in rows]
        made = now.engine.complete(of_rows, rows, seed, now.members, self.args.generation_batch_size)
        return [
            {"prompt_ids": ids, "completion_ids": completion.ids, "text": completion.text}
            for ids, completion in zip(of_rows, made, strict=True)
        ]
