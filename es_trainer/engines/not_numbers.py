"""Logits that are not numbers."""

import torch
from transformers import LogitsProcessor


NOT_NUMBERS = "The model's logits are not numbers (NaN)."


class NaNLogits(LogitsProcessor):
    """Notes whether logits are NaN, of which greedy decoding would choose one without a word."""

    def __init__(self):
        self.seen: torch.Tensor | bool = False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # The largest of a row is NaN if any is. What was seen stays on the device: no step waits for it
        self.seen = scores.amax(-1).isnan().any() | self.seen
        return scores

    def check(self) -> None:
        """
        To be called after generation: processes in lockstep go through every forward pass together.

        Raises:
            `FloatingPointError`: If logits were NaN.
        """
        if self.seen:
            raise FloatingPointError(NOT_NUMBERS)
