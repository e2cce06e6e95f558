"""Sampling with common random numbers."""

import hashlib
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..noise import noise


def derived_seed(*parts: Any) -> int:
    """A seed that follows from others, and from what it is for."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # a positive int64


class CommonRandomNumbers(LogitsProcessor):
    """
    Adds Gumbel noise to the logits, so that their argmax is a sample (the Gumbel-max trick).

    The noise of a token depends only on the seed, the prompt, which of the prompt's completions it is and the
    position: it is the same for every member, and however rows are batched.

    Args:
        seed (`int`):
            Seed of the step.
        rows (`list[tuple[int, int]]`):
            Prompt and number of the completion of each row in the batch.
        prompt_length (`int`):
            Length of the padded prompts; tokens after it are the completion.
    """

    def __init__(self, seed: int, rows: list[tuple[int, int]], prompt_length: int):
        self.seed = seed
        self.rows = rows
        self.prompt_length = prompt_length

    def keep(self, indices: list[int]) -> None:
        """Go on with these rows of the batch."""
        self.rows = [self.rows[i] for i in indices]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        position = input_ids.shape[1] - self.prompt_length
        draws = {row: i for i, row in enumerate(dict.fromkeys(self.rows))}  # members share them
        normals = scores.new_empty(len(draws), scores.shape[1], dtype=torch.float32)
        for row, (prompt, completion) in zip(normals, draws, strict=True):
            noise.fill(row, f"sample/{prompt}/{completion}", self.seed, start=position * len(row))
        # The normal's distribution function makes it uniform: -log(-log(uniform)) is a standard Gumbel variable
        gumbel = -torch.log(-torch.special.log_ndtr(normals))
        return scores + gumbel[[draws[row] for row in self.rows]]


def sampling_processors(
    temperature: float, top_k: int, top_p: float, min_p: float | None, random_numbers: CommonRandomNumbers
) -> LogitsProcessorList:
    """What turns logits into samples under argmax, in the order in which Transformers applies it."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        processors.append(MinPLogitsWarper(min_p))
    processors.append(random_numbers)
    return processors
