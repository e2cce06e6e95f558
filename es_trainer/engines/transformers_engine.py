"""Completions by Transformers' `generate`."""

import functools
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from ..config import ESConfig
from ..rollout import Completion
from . import trial
from .base import Engine
from .continuous_batch import ContinuousBatch
from .decoding import Decoding, Row, follows
from .forward_pass import image_inputs, logits
from .generation_config import generation_config
from .head_inputs import make_contiguous
from .image_prompts import ImagePrompt
from .not_numbers import NOT_NUMBERS, NaNLogits
from .population_batch import Rows
from .running_batch import RowCache
from .sampling import CommonRandomNumbers, sampling_processors


logger = logging.get_logger(__name__)


class TransformersEngine(Engine):
    """
    Generates with the model's weights as they are at that moment.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Its tokenizer, with a padding token, or its processor.
        args ([`ESConfig`]):
            Generation parameters.
        lockstep (`tuple[int, int]`, *optional*):
            Rank of this process and number of processes, if they go through every forward pass together, because each
            has a part of the weights only. Then each completes its share of the prompts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: ESConfig,
        lockstep: tuple[int, int] | None = None,
    ):
        super().__init__(model, processing_class, args)
        make_contiguous(model)
        self.lockstep = lockstep
        self.reads_images = lockstep is None  # or a process without images would leave the others waiting
        self.generation_config, self.sampling = generation_config(
            model.generation_config, self.tokenizer, self.eos_token_ids, args
        )
        # `generate` makes this one from the config only for decoding methods of its own
        stop_strings, self.generation_config.stop_strings = self.generation_config.stop_strings, None
        self.stopping_criteria = [StopStringCriteria(self.tokenizer, stop_strings)] if stop_strings else []
        self._most_rows: int | None = None  # at once, since memory ran out
        self._members: Rows | None = None  # that are installed in the model

    def use(self, members: Rows | None) -> None:
        """Generate with a group of members that is installed in the model, or with the weights as they are."""
        self.model.eval()
        self._members = members

    @functools.cached_property
    def drops_finished_rows(self) -> bool:
        """Whether `Decoding` takes the place of `generate`'s own decoding, in which finished rows run on."""
        return self._is_plain() and self._decodes_alike()

    def _is_plain(self) -> bool:
        """Whether nothing is asked for that `Decoding` does not have."""
        layers = DynamicCache(config=self.model.config).layers
        return (
            self.lockstep is None
            and follows(self.generation_config)
            and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        )

    def _decodes_alike(self) -> bool:
        """
        Try whether `Decoding` and `generate` agree. They don't where a model keeps what it has read elsewhere than in
        the cache that it is given (RWKV, XLNet), keeps nothing (OpenAI GPT), makes more of its inputs (CPM-Ant) or
        cannot go on from what it has read with several tokens at once (MPT).

        Raises:
            `FloatingPointError`: If logits are NaN.
        """
        group = self._members.group if self._members else 1
        rows = [Row(i % group, i, 0) for i in range(len(trial.LENGTHS))]
        if self._members is not None:
            self._members.assign([row.member for row in rows])
        try:
            theirs = trial.answers(self.model)
            decoding = Decoding(rows, list(trial.LENGTHS), self._members, caches={})
            mine = trial.answers(self.model, decoding)
            decoding.caches = {
                row: cache and RowCache(cache.ids[: trial.BEGINNING], cache.layers)
                for row, cache in decoding.caches.items()
            }
            continued = trial.answers(self.model, decoding)
        except Exception as error:  # whatever a model raises that is given inputs that it does not know
            logger.info(f"Transformers' own loop generates, in which finished rows run on: {error!r}.")
            return False
        if theirs.isnan().any():  # which says nothing about the two, and would be remembered
            raise FloatingPointError(NOT_NUMBERS)
        differences = [trial.distance(answers, theirs) for answers in (mine, continued)]
        logger.info(
            f"Decoding without finished rows is {differences[0]:.1e} away from Transformers' own loop, and "
            f"{differences[1]:.1e} where the beginnings were read before."
        )
        return all(difference <= trial.tolerance(self.model) for difference in differences)

    @property
    def max_new_tokens(self) -> int:
        return self.generation_config.max_new_tokens

    def prompt_shard(self, num_prompts: int) -> range:
        """Numbers of the prompts that this process completes."""
        rank, processes = self.lockstep or (0, 1)
        return range(rank, num_prompts, processes)

    def generate_each(
        self,
        prompt_ids: Sequence[list[list[int]]],
        seed: int,
        num_generations: int = 1,
        members: Rows | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Complete prompts that each member has of its own; see [`Engine.generate_each`]."""
        num_prompts = len(prompt_ids[0])
        rows = self._rows(len(prompt_ids), num_prompts, num_generations)
        wanted = len(rows)
        if self.lockstep:
            # As many rows as the others, or they would wait for this process
            most = -(-num_prompts // self.lockstep[1]) * num_generations
            rows += [Row(0, 0, 0)] * (most - wanted)
        ids = [prompt_ids[row.member][row.prompt] for row in rows]
        return self.complete(ids, rows, seed, members, batch_size, progress)[:wanted]

    def complete(
        self,
        ids: list[list[int]],
        rows: list[Row],
        seed: int,
        members: Rows | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        caches: dict[Row, RowCache | None] | None = None,
    ) -> list[Completion]:
        """
        Complete rows that have a text of their own each; the rest is as with `generate`.

        Args:
            ids (`list[list[int]]`):
                Tokens that each row goes on from.
            rows (`list[Row]`):
                What each row is.
            caches (`dict[Row, RowCache | None]`, *optional*):
                What calls for earlier turns of the same rows and weights have left here: keys and values of tokens
                that are not computed again.
        """
        self.use(members)
        completions: dict[int, Completion] = {}
        size = min(batch_size or len(rows), self._most_rows or len(rows))
        waiting = deque(_batches(ids, size))
        while waiting:
            batch = waiting.popleft()
            try:
                made = self._generate_batch(
                    [ids[i] for i in batch], [rows[i] for i in batch], seed, members, progress, caches
                )
            except RuntimeError as error:
                # Processes that go through forward passes together would wait for each other
                if not should_reduce_batch_size(error) or len(batch) == 1 or self.lockstep:
                    raise
                self._lower_most_rows(-(-len(batch) // 2))
                if caches is not None:
                    caches.clear()
                waiting.extendleft((batch[: self._most_rows], batch[self._most_rows :]))
            else:
                completions.update(zip(batch, made, strict=True))
        return [completions[i] for i in range(len(rows))]

    def _lower_most_rows(self, most_rows: int) -> None:
        if self._most_rows is None:
            logger.warning(
                "Memory ran out while completions were generated. From here on, no more than half as many are "
                f"generated at once ({most_rows}), and fewer if that is too much, too. Set `generation_batch_size` to "
                "choose a number. (Shown once.)"
            )
        self._most_rows = most_rows
        clear_device_cache(garbage_collection=True)

    @torch.inference_mode()
    def logits(self, prompt: list[int], last: int) -> torch.Tensor:
        """Logits that the weights as they are have after the last tokens of a text; see [`forward_pass.logits`]."""
        self.use(None)
        return logits(self.model, self.images, prompt, last)

    def trial_inputs(self, prompt: list[int] | None) -> dict[str, torch.Tensor] | None:
        """A prompt with images as [`trial.answers`] takes it."""
        if prompt is None:
            return None
        copies = [prompt] * len(trial.LENGTHS)
        ids = torch.tensor(copies, device=self.model.device)
        of_images = image_inputs(self.images, copies, self.model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **of_images}

    def requests(self, members: Rows | None, most_rows: int | None = None) -> ContinuousBatch:
        """
        Requests that are answered as they come.

        Args:
            members ([`Rows`], *optional*):
                The group of members that is installed in the model.
            most_rows (`int`, *optional*):
                Most requests that are answered at once. If `None`, all.

        Raises:
            `ValueError`: If the model generates by Transformers' own loop only.
        """
        return ContinuousBatch(self, members, most_rows)

    def _generate_batch(
        self,
        prompt_ids: list[list[int]],
        rows: list[Row],
        seed: int,
        members: Rows | None,
        progress: bool,
        caches: dict[Row, RowCache | None] | None,
    ) -> list[Completion]:
        lengths = [len(prompt) for prompt in prompt_ids]
        width = max(lengths)
        input_ids = torch.full((len(rows), width), self.generation_config.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, prompt in enumerate(prompt_ids):
            input_ids[i, width - lengths[i] :] = torch.tensor(prompt)
            attention_mask[i, width - lengths[i] :] = 1

        nan = NaNLogits()
        processors = LogitsProcessorList([nan])
        if self.sampling["temperature"] > 0:
            random_numbers = CommonRandomNumbers(seed, [(row.prompt, row.number) for row in rows], width)
            processors += sampling_processors(**self.sampling, random_numbers=random_numbers)
        of_images = image_inputs(self.images, prompt_ids, self.model.device)
        decoding = None
        if self.drops_finished_rows and not of_images:
            decoding = Decoding(rows, lengths, members, progress, caches)
        if members is not None:
            members.assign([row.member for row in rows])
        with trial.without_defaults(self.model):
            output = self.model.generate(
                input_ids=input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
                **of_images,
                generation_config=self.generation_config,
                logits_processor=processors,
                stopping_criteria=self.stopping_criteria,
                synced_gpus=self.lockstep is not None,
                custom_generate=decoding,
            )
        nan.check()
        if decoding is None:
            output = [self._without_padding(ids) for ids in output[:, width:].tolist()]
        return [
            self._completion(ids, truncated=len(ids) == self.max_new_tokens and not self._ends(prompt, ids))
            for prompt, ids in zip(prompt_ids, output, strict=True)
        ]

    def _ends(self, prompt_ids: list[int], ids: list[int]) -> bool:
        """Whether the last token ends a completion, however long that might be."""
        tokens = torch.tensor([prompt_ids + ids], device=self.model.device)
        return ids[-1] in self.eos_token_ids or any(stop(tokens, None).any() for stop in self.stopping_criteria)

    def _without_padding(self, ids: list[int]) -> list[int]:
        """The tokens up to and with the one that ended them."""
        end = next((i for i, token in enumerate(ids) if token in self.eos_token_ids), None)
        if end is not None:
            return ids[: end + 1]
        length = len(ids)
        while self.stopping_criteria and length > 1 and ids[length - 1] == self.generation_config.pad_token_id:
            length -= 1
        return ids[:length]


def _batches(prompts: list[list[int]], size: int) -> Iterator[list[int]]:
    """
    Numbers of the prompts that are completed together, `size` at most. Those of like length share a batch, which makes
    less padding, and those with images have batches of their own.
    """
    for has_images in (False, True):
        some = [i for i, prompt in enumerate(prompts) if isinstance(prompt, ImagePrompt) == has_images]
        by_length = sorted(some, key=lambda i: len(prompts[i]))
        for start in range(0, len(some), size):
            yield sorted(by_length[start : start + size])
