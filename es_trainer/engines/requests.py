"""Completions that are asked for one by one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase


@dataclass(eq=False)
class Request:
    """
    A completion that somebody asks for.

    Args:
        ids (`list[int]`):
            Tokens to go on from.
        member (`int`):
            Number of the member in the group that answers.
        max_tokens (`int`):
            Most tokens of the completion.
        sampling (`dict[str, Any]`):
            Temperature, top-k, top-p and min-p.
        seed (`int`):
            Seed of the random numbers.
        stop (`list[str]`, *optional*):
            Texts that end the completion, and are not part of it.
        told (`Callable`, *optional*):
            Called in the end, in the thread that generates.
        every_token (`bool`, *optional*, defaults to `False`):
            Whether it is called after each token.
        cache ([`RowCache`], *optional*):
            Keys and values of the beginning of `ids`. In the end, those of the whole text.
    """

    ids: list[int]
    member: int
    max_tokens: int
    sampling: dict[str, Any]
    seed: int
    stop: list[str] = field(default_factory=list)
    told: Callable[["Request"], None] | None = None
    every_token: bool = False
    cache: Any = None
    new: list[int] = field(default_factory=list)  # tokens of the completion
    text: str = ""
    finish_reason: str | None = None  # "stop" or "length", by OpenAI's names
    cancelled: bool = False

    def tell(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tell who asked, if there is something that they want to know."""
        if self.every_token or self.finish_reason is not None:
            self.decode(tokenizer)
            if self.told is not None:
                self.told(self)

    def decode(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Make the text of the tokens. Returns whether it has a text that ends it."""
        self.text = tokenizer.decode(self.new, skip_special_tokens=True)
        ends = [at for stop in self.stop if (at := self.text.find(stop)) >= 0]
        if ends:
            self.text = self.text[: min(ends)]
        return bool(ends)


class Requests(Protocol):
    """Answers requests as they come."""

    def __len__(self) -> int:
        """How many requests are being answered, or wait."""

    def add(self, request: Request) -> None:
        """Answer a request from the next token on."""

    def step(self) -> None:
        """
        Generate a token for each request, and tell those who asked. Cancelled requests are dropped.

        Raises:
            `FloatingPointError`: If logits are NaN.
        """

    def close(self) -> None:
        """Drop the requests that have not ended."""
