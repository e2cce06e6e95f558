"""What engines have in common: prompts to tokens, tokens to completions."""

import contextlib
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from ..config import ESConfig
from ..rollout import Completion
from .decoding import Row
from .image_prompts import ImageTemplate
from .vocabulary import check_token_ids, embedding_rows, tokenizer_of


logger = logging.get_logger(__name__)


class Engine:
    """
    Generates completions. An engine has a method `complete`, like [`TransformersEngine.complete`], and `requests`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Its tokenizer, with a padding token, or its processor.
        args ([`ESConfig`]):
            Generation parameters.
    """

    reads_images = False
    max_new_tokens: int

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: ESConfig,
    ):
        self.model = model
        self.tokenizer = tokenizer = tokenizer_of(processing_class)
        self.chat_template_kwargs = args.chat_template_kwargs or {}
        self.images = None
        if isinstance(processing_class, ProcessorMixin):
            placeholder = model.config.image_token_id
            self.images = ImageTemplate(processing_class, self.chat_template_kwargs, placeholder)
        self.eos_token_ids = _eos_token_ids(model, tokenizer, args)
        self.context = context_length(model.config)
        self.embedding_rows = embedding_rows(model)
        begin = tokenizer.bos_token_id
        self.adds_begin = begin is not None and tokenizer(text="")["input_ids"][:1] == [begin]

    def tokenize(self, prompts: list[str] | list[list[dict[str, Any]]]) -> list[list[int]]:
        """
        Tokens of the prompts: by the chat template if they are conversational, as plain text otherwise. Those with
        images are [`ImagePrompt`]s.

        Args:
            prompts (`list`):
                Texts or lists of messages.

        Raises:
            `ValueError`: If a prompt is refused by `encode` or `check_lengths`.
        """
        ids = self.encode(prompts)
        self.check_lengths([len(tokens) for tokens in ids], isinstance(prompts[0], list))
        return ids

    def encode(self, prompts: list[str] | list[list[dict[str, Any]]], first_row: int = 0) -> list[list[int]]:
        """
        The same, however many tokens they are.

        Args:
            prompts (`list`):
                Texts or lists of messages.
            first_row (`int`, *optional*, defaults to `0`):
                Number of the first prompt, for errors.

        Raises:
            `TypeError`: If a prompt is neither a text nor a list of messages.
            `ValueError`: If a conversational prompt meets a tokenizer without chat template, a message has a part
                that the model would not see, or the model has no embedding for a token.
        """
        conversational = isinstance(prompts[0], list)
        for row, prompt in enumerate(prompts, first_row):
            _check_prompt(row, prompt, conversational)
            if conversational:
                self._check_parts(row, prompt)
        if conversational:
            what = self.tokenizer if self.images is None else self.images.processor
            if what.chat_template is None:
                raise ValueError(
                    "The prompts are conversational, but the tokenizer has no chat template. Set "
                    "`tokenizer.chat_template` (see `trl.clone_chat_template`) or give the prompts as plain text."
                )
        if conversational and self.images is not None:
            ids = self.images.encode(prompts, first_row)
        elif conversational:
            ids = self.tokenizer.apply_chat_template(
                prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **self.chat_template_kwargs
            )["input_ids"]
        else:
            ids = [self._with_one_begin(tokens) for tokens in self.tokenizer(text=prompts)["input_ids"]]
        for row, tokens in enumerate(ids, first_row):
            check_token_ids(self.embedding_rows, self.tokenizer, tokens, f"Prompt {row} has the token")
        return ids

    def _check_parts(self, row: int, prompt: list[dict[str, Any]]) -> None:
        """Raise what speaks against a part of a message."""
        for message in prompt:
            for part in message["content"] if isinstance(message.get("content"), list) else []:
                kind = part["type"]
                if kind == "text" or (kind == "image" and "image" in part and self.images and self.reads_images):
                    continue
                if kind != "image":
                    reason = "video and audio are not supported"
                elif self.images is None:
                    reason = "`processing_class` is a tokenizer: give a model that reads images and its processor"
                elif not self.reads_images:
                    reason = "images are not supported with what generates here (see docs/images.md)"
                else:
                    raise ValueError(
                        f"Prompt {row} has a part of type 'image' without an image: give it as "
                        "{'type': 'image', 'image': ...}, or in a column 'image' or 'images'."
                    )
                raise ValueError(
                    f"Prompt {row} has a part of type {kind!r}, but {reason}. The model would not see it: leave such "
                    "parts out to train on the rest."
                )

    def _with_one_begin(self, ids: list[int]) -> list[int]:
        begin = self.tokenizer.bos_token_id
        if not self.adds_begin or ids[:2] != [begin, begin]:
            return ids
        logger.warning_once(
            f"Prompts begin with {self.tokenizer.bos_token!r}, as texts that were made by a chat template do, and the "
            "tokenizer adds another: it is left out."
        )
        return ids[1:]

    def check_lengths(self, lengths: list[int], conversational: bool, name: str = "dataset") -> None:
        """
        Args:
            lengths (`list[int]`):
                Numbers of tokens of prompts.
            conversational (`bool`):
                Whether they are conversational.
            name (`str`, *optional*, defaults to `"dataset"`):
                What errors call the dataset.

        Raises:
            `ValueError`: If a prompt is empty or leaves no room for a completion in the model's context. Says how many
                do, and what drops them.
        """
        if 0 in lengths:
            raise ValueError(f"Prompt {lengths.index(0)} is empty: the model needs at least one token to go on from.")
        if self.context is None or max(lengths) + self.max_new_tokens <= self.context:
            return
        room = self.context - self.max_new_tokens
        too_long = [row for row, length in enumerate(lengths) if length > room]
        tokens = 'tokenizer(row["prompt"])'
        if self.images is not None:
            raise ValueError(
                f"Prompt {too_long[0]} has {lengths[too_long[0]]} tokens, with those of its images; with "
                f"`max_completion_length={self.max_new_tokens}` that is more than the context of {self.context} "
                f"tokens. Too long are {len(too_long)} of {len(lengths)} prompts, the longest with {max(lengths)} "
                "tokens. Lower `max_completion_length`, let the image processor make images smaller "
                "(`processor.image_processor.size`), or drop these rows."
            )
        if conversational:
            options = f", **{self.chat_template_kwargs!r}" if self.chat_template_kwargs else ""
            arguments = f'row["prompt"], add_generation_prompt=True, return_dict=True{options}'
            tokens = f"tokenizer.apply_chat_template({arguments})"
        drop = f'`{name} = {name}.filter(lambda row: len({tokens}["input_ids"]) <= {room})`'
        raise ValueError(
            f"Prompt {too_long[0]} has {lengths[too_long[0]]} tokens; with "
            f"`max_completion_length={self.max_new_tokens}` that is more than the context of {self.context} tokens. "
            f"Too long are {len(too_long)} of {len(lengths)} prompts, the longest with {max(lengths)} tokens. Lower "
            f"`max_completion_length`{f', or drop them: {drop}' if room > 0 else ''}."
        )

    def reset_prefix_cache(self) -> None:
        """Drop keys and values that were computed with earlier weights."""

    def woken_up(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the engine has all memory that it needs to generate."""
        return contextlib.nullcontext()

    def prompt_shard(self, num_prompts: int) -> range:
        """Numbers of the prompts that this process completes."""
        return range(num_prompts)

    def generate(
        self,
        prompt_ids: list[list[int]],
        seed: int,
        num_generations: int = 1,
        members: Any = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """
        Complete the prompts, or this process's share of them.

        Args:
            prompt_ids (`list[list[int]]`):
                What `tokenize` returned. Prompts with images are [`ImagePrompt`]s.
            seed (`int`):
                Seed of the random numbers; without effect if decoding is greedy.
            num_generations (`int`, *optional*, defaults to `1`):
                Completions per prompt.
            members (`Any`, *optional*):
                The group of members that is installed. `None` generates with the weights as they are.
            batch_size (`int`, *optional*):
                Most sequences generated at once. If `None`, all. Without effect with vLLM, which chooses batches by
                itself.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a bar of the tokens.

        Returns:
            `list[Completion]`: `num_generations` completions of the first prompt, then of the second, and so on; all
            of the first member, then of the second, and so on.

        Raises:
            `FloatingPointError`: If logits are NaN.
        """
        of_members = [prompt_ids] * (1 if members is None else len(members))
        return self.generate_each(of_members, seed, num_generations, members, batch_size, progress)

    def generate_each(
        self,
        prompt_ids: Sequence[list[list[int]]],
        seed: int,
        num_generations: int = 1,
        members: Any = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """
        Complete prompts that each member has of its own; the rest is as with `generate`.

        Args:
            prompt_ids (`Sequence[list[list[int]]]`):
                Tokens of the prompts of each member, or of the weights as they are. All have equally many prompts.
        """
        rows = self._rows(len(prompt_ids), len(prompt_ids[0]), num_generations)
        ids = [prompt_ids[row.member][row.prompt] for row in rows]
        return self.complete(ids, rows, seed, members, batch_size, progress)

    def _rows(self, members: int, num_prompts: int, num_generations: int) -> list[Row]:
        """The completions to be made of this process's share of the prompts."""
        return [
            Row(member, prompt, number)
            for member in range(members)
            for prompt in self.prompt_shard(num_prompts)
            for number in range(num_generations)
        ]

    def _completion(self, ids: list[int], truncated: bool) -> Completion:
        return Completion(ids, self.tokenizer.decode(ids, skip_special_tokens=True), truncated)


def context_length(config: PreTrainedConfig) -> int | None:
    """Most tokens that a model can read, or `None` if nothing bounds them (ALiBi, recurrent models)."""
    config = config.get_text_config()
    if getattr(config, "alibi", False):  # Falcon, which has a number of positions nevertheless
        return None
    # Attributes, not entries: most names of other models (`n_positions`, ...) are mapped to the first. MPT's is not
    for name in ("max_position_embeddings", "max_seq_len"):
        length = getattr(config, name, None)
        if length is not None:
            return length if length > 0 else None
    return None


def _check_prompt(row: int, prompt: Any, conversational: bool) -> None:
    if isinstance(prompt, str) and not conversational:
        return
    if not isinstance(prompt, list) or not all(isinstance(m, dict) and "role" in m for m in prompt):
        raise TypeError(
            f"Prompt {row} is {str(prompt)[:60]!r}, of type {type(prompt).__name__}, but prompts must be texts or "
            "lists of messages with 'role' and 'content'."
        )
    if not conversational:
        raise TypeError(f"Prompt {row} is a list of messages, but others are texts: make them all of one kind.")
    if not prompt:
        raise ValueError(f"Prompt {row} is empty: it has no messages.")


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: ESConfig) -> list[int]:
    """
    Every token that ends a completion: those of `generation_kwargs`, or else those that the model declares (an
    end-of-turn token) and the tokenizer's.
    """
    override = (args.generation_kwargs or {}).get("eos_token_id")
    declared = model.generation_config.eos_token_id if override is None else override
    ids = declared if isinstance(declared, list) else [declared]
    if override is None:
        ids = [*ids, tokenizer.eos_token_id]
    return [token for token in dict.fromkeys(ids) if token is not None]
