"""Prompts as vLLM takes them, with images or without."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from .image_prompts import ImagePrompt, ImageTemplate


if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams


def generate(
    llm: "LLM",
    prompts: Sequence[list[int]],
    images: ImageTemplate | None,
    salt: str,
    params: "SamplingParams | list[SamplingParams]",
    **options: Any,
) -> "list[RequestOutput]":
    """
    Complete prompts with weights that may have changed since the last call.

    Args:
        llm ([`~vllm.LLM`]):
            The engine.
        prompts (`Sequence[list[int]]`):
            Tokens of the prompts; those with images are [`ImagePrompt`]s.
        images ([`ImageTemplate`], *optional*):
            What made the prompts with images.
        salt (`str`):
            Salt of vLLM's prefix cache, which no other weights have.
        params (`SamplingParams` or `list[SamplingParams]`):
            Sampling parameters, of each prompt or of all.
        options:
            Keyword arguments of vLLM's `generate`.

    Raises:
        `RuntimeError`: If vLLM makes other tokens of a prompt with images than the processor.
    """
    # What the vision tower makes of an image is cached by the image alone, whatever the salt
    llm.llm_engine.reset_encoder_cache()
    outputs = llm.generate([_as_input(prompt, images, salt) for prompt in prompts], params, **options)
    for prompt, output in zip(prompts, outputs, strict=True):
        if output.prompt_token_ids != list(prompt):
            raise RuntimeError(
                f"vLLM makes other tokens of a prompt with images ({len(output.prompt_token_ids)}) than the processor "
                f"({len(prompt)}): the model would not see what it is trained on. Set use_vllm=False."
            )
    return outputs


def _as_input(prompt: list[int], images: ImageTemplate | None, salt: str) -> dict[str, Any]:
    if not isinstance(prompt, ImagePrompt):
        return {"prompt_token_ids": prompt, "cache_salt": salt}
    # vLLM processes the images by itself, and puts in as many tokens as they take
    ids = images.without_expansion(prompt)
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": prompt.images}, "cache_salt": salt}


def has_processor(
    source: str, processing_class: PreTrainedTokenizerBase | ProcessorMixin, options: dict[str, Any]
) -> bool:
    """
    Whether vLLM processes images as the trainer does if it loads the model, and with it the processor, by its name.

    Args:
        source (`str`):
            Name or folder of the model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            The trainer's.
        options (`dict[str, Any]`):
            Keyword arguments of `from_pretrained`.
    """
    if not isinstance(processing_class, ProcessorMixin):
        return True
    return AutoProcessor.from_pretrained(source, **options).to_dict() == processing_class.to_dict()
