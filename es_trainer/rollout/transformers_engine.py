"""Completions by Transformers' `generate`."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from ..config import ESConfig
from .sampling import CommonRandomNumbers, sampling_processors


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
            Whether it was cut at the maximum length.
    """

    ids: list[int]
    text: str
    truncated: bool


class TransformersEngine:
    """
    Generates with the model's weights as they are at that moment.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a padding token.
        args ([`ESConfig`]):
            Generation parameters.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: ESConfig):
        self.model = model
        self.tokenizer = tokenizer
        self.chat_template_kwargs = args.chat_template_kwargs or {}
        self.batch_size = args.generation_batch_size
        self.eos_token_ids = _eos_token_ids(model, tokenizer)

        options = {
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
            "min_p": args.min_p,
            "max_new_tokens": args.max_completion_length,
            "repetition_penalty": args.repetition_penalty,
            "cache_implementation": args.cache_implementation,
            **(args.generation_kwargs or {}),
        }
        self.sampling: dict[str, Any] = {key: options.pop(key) for key in ("temperature", "top_k", "top_p", "min_p")}
        self.generation_config = GenerationConfig(
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=self.eos_token_ids,
            **options,
        )

    @property
    def max_new_tokens(self) -> int:
        return self.generation_config.max_new_tokens

    def tokenize(self, prompts: list[str] | list[list[dict[str, Any]]], first_row: int = 0) -> list[list[int]]:
        """
        Tokens of the prompts: by the chat template if they are conversational, as plain text otherwise.

        Args:
            prompts (`list`):
                Texts or lists of messages.
            first_row (`int`, *optional*, defaults to `0`):
                Number of the first prompt, for errors.

        Raises:
            `ValueError`: If a conversational prompt meets a tokenizer without chat template, or a prompt leaves no
                room for a completion in the model's context.
        """
        if is_conversational({"prompt": prompts[0]}):
            if self.tokenizer.chat_template is None:
                raise ValueError(
                    "The prompts are conversational, but the tokenizer has no chat template. Set "
                    "`tokenizer.chat_template` (see `trl.clone_chat_template`) or give the prompts as plain text."
                )
            ids = self.tokenizer.apply_chat_template(
                prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **self.chat_template_kwargs
            )["input_ids"]
        else:
            ids = self.tokenizer(text=prompts)["input_ids"]
        self._check_lengths(ids, first_row)
        return ids

    def _check_lengths(self, prompt_ids: list[list[int]], first_row: int) -> None:
        context = self.model.config.get_text_config().to_dict().get("max_position_embeddings")
        for row, ids in enumerate(prompt_ids, first_row):
            if not ids:
                raise ValueError(f"Prompt {row} is empty: the model needs at least one token to go on from.")
            if context is not None and len(ids) + self.max_new_tokens > context:
                raise ValueError(
                    f"Prompt {row} has {len(ids)} tokens; with `max_completion_length={self.max_new_tokens}` that is "
                    f"more than the model's context of {context}. Shorten or drop such prompts, or lower "
                    "`max_completion_length`."
                )

    def generate(self, prompt_ids: list[list[int]], seed: int, num_generations: int = 1) -> list[Completion]:
        """
        Complete the prompts.

        Args:
            prompt_ids (`list[list[int]]`):
                What `tokenize` returned.
            seed (`int`):
                Seed of the random numbers; without effect if decoding is greedy.
            num_generations (`int`, *optional*, defaults to `1`):
                Completions per prompt.

        Returns:
            `list[Completion]`: `num_generations` completions of the first prompt, then of the second, and so on.
        """
        self.model.eval()
        rows = [(prompt, number) for prompt in range(len(prompt_ids)) for number in range(num_generations)]
        # Prompts of like length share a batch: less padding
        by_length = sorted(rows, key=lambda row: len(prompt_ids[row[0]]))
        size = self.batch_size or len(rows)
        completions: dict[tuple[int, int], Completion] = {}
        for start in range(0, len(rows), size):
            batch = by_length[start : start + size]
            completions.update(zip(batch, self._generate_batch(prompt_ids, batch, seed), strict=True))
        return [completions[row] for row in rows]

    def _generate_batch(self, prompt_ids: list[list[int]], rows: list[tuple[int, int]], seed: int) -> list[Completion]:
        length = max(len(prompt_ids[prompt]) for prompt, _ in rows)
        input_ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, (prompt, _) in enumerate(rows):
            ids = torch.tensor(prompt_ids[prompt])
            input_ids[i, length - len(ids) :] = ids
            attention_mask[i, length - len(ids) :] = 1

        processors = None
        if self.sampling["temperature"] > 0:
            processors = sampling_processors(**self.sampling, random_numbers=CommonRandomNumbers(seed, rows, length))
        output = self.model.generate(
            input_ids=input_ids.to(self.model.device),
            attention_mask=attention_mask.to(self.model.device),
            generation_config=self.generation_config,
            logits_processor=processors,
            tokenizer=self.tokenizer,  # stop strings need it
        )
        return [self._completion(ids) for ids in output[:, length:].tolist()]

    def _completion(self, ids: list[int]) -> Completion:
        end = next((i for i, token in enumerate(ids) if token in self.eos_token_ids), None)
        truncated = end is None and len(ids) == self.max_new_tokens
        if end is not None:
            ids = ids[: end + 1]
        return Completion(ids, self.tokenizer.decode(ids, skip_special_tokens=True), truncated)


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: those that the model declares (an end-of-turn token) and the tokenizer's."""
    declared = model.generation_config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return [token for token in dict.fromkeys([*ids, tokenizer.eos_token_id]) if token is not None]
