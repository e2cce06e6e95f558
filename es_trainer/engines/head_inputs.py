"""What the head reads, which makes logits of hidden states."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def make_contiguous(model: PreTrainedModel) -> None:
    """
    Let the head read contiguous hidden states from here on.

    Models give it those of the last tokens, which are a view of all. Of a view and a weight without gradient, as the
    head beside adapters has, torch makes a product for each row, each with a copy of the weight.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model. One without a head is left alone.
    """
    head = model.get_output_embeddings()
    if head is not None and _contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_contiguous)


def _contiguous(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, *others = args
    return hidden.contiguous(), *others
