"""What engines have in common: prompts to tokens, tokens to completions."""

import contextlib
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from ..config import ESConfig


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
        others (`int`, *optional*, defaults to `0`):
            How many of the tokens are not the model's own, but an environment's.
    """

    ids: list[int]
    text: str
    truncated: bool
    others: int = 0

    @property
    def length(self) -> int:
        """Number of tokens that the model wrote."""
        return len(self.ids) - self.others


class Engine:
    """
    Generates completions. An engine has a method `generate`, like [`TransformersEngine.generate`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a padding token.
        args ([`ESConfig`]):
            Generation parameters.
    """

    max_new_tokens: int

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: ESConfig):
        self.model = model
        self.tokenizer = tokenizer
        self.chat_template_kwargs = args.chat_template_kwargs or {}
        self.eos_token_ids = _eos_token_ids(model, tokenizer)
        self.context = model.config.get_text_config().to_dict().get("max_position_embeddings")

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
        for row, ids in enumerate(prompt_ids, first_row):
            if not ids:
                raise ValueError(f"Prompt {row} is empty: the model needs at least one token to go on from.")
            if self.context is not None and len(ids) + self.max_new_tokens > self.context:
                raise ValueError(
                    f"Prompt {row} has {len(ids)} tokens; with `max_completion_length={self.max_new_tokens}` that is "
                    f"more than the context of {self.context} tokens. Shorten or drop such prompts, or lower "
                    "`max_completion_length`."
                )

    def forget(self) -> None:
        """Drop what was computed with weights that have changed since."""

    def awake(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the engine has all the memory that it generates with."""
        return contextlib.nullcontext()

    def own_prompts(self, count: int) -> range:
        """Which of so many prompts this process completes."""
        return range(count)

    def _completion(self, ids: list[int]) -> Completion:
        truncated = len(ids) == self.max_new_tokens and ids[-1] not in self.eos_token_ids
        return Completion(ids, self.tokenizer.decode(ids, skip_special_tokens=True), truncated)


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: those that the model declares (an end-of-turn token) and the tokenizer's."""
    declared = model.generation_config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return [token for token in dict.fromkeys([*ids, tokenizer.eos_token_id]) if token is not None]
