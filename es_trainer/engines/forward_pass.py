"""One forward pass of a Transformers model over a prompt, which may have images."""

import inspect
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel

from .image_prompts import ImagePrompt, ImageTemplate


def image_inputs(
    images: ImageTemplate | None, prompts: list[list[int]], device: torch.device
) -> dict[str, torch.Tensor]:
    """What a model reads of prompts beside their tokens; nothing if they are texts."""
    if not isinstance(prompts[0], ImagePrompt):
        return {}
    return {name: values.to(device) for name, values in images.inputs(prompts).items()}


def logits(model: PreTrainedModel, images: ImageTemplate | None, prompt: list[int], last: int) -> torch.Tensor:
    """
    Logits after the last tokens of a text.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, with weights.
        images ([`ImageTemplate`], *optional*):
            What made a prompt with images.
        prompt (`list[int]`):
            Tokens of the text, or a prompt with images.
        last (`int`):
            After how many tokens at most.

    Returns:
        `torch.Tensor` of shape `(tokens, vocabulary)`, on the model's device and in the dtype that it has there.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    taken = inspect.signature(base.forward).parameters
    options = {"logits_to_keep": last} if "logits_to_keep" in taken else {}
    ids = torch.tensor([prompt], device=base.device)
    return base(input_ids=ids, **image_inputs(images, [prompt], base.device), **options).logits[0, -last:]


def parameters_behind(model: PreTrainedModel, images: ImageTemplate | None, prompt: list[int]) -> set[nn.Parameter]:
    """
    The parameters with `requires_grad` that what a model says to a prompt depends on.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, with weights.
        images ([`ImageTemplate`], *optional*):
            What made a prompt with images.
        prompt (`list[int]`):
            Tokens of the text, or a prompt with images.
    """
    # No gradient is computed: autograd's graph alone says it, and what gradients would need is not kept
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: None):
        nodes = [logits(model, images, prompt, last=1).grad_fn]
    seen: set[Any] = set()
    found: set[nn.Parameter] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        if node.name().endswith("AccumulateGrad"):
            found.add(node.variable)
    return found
