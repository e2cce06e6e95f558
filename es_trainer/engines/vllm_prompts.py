"""Prompts as vLLM takes them, with images or without, in this process and on servers."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from ..config import ESConfig
from .image_prompts import ImagePrompt


if TYPE_CHECKING:
    from PIL.Image import Image
    from vllm import LLM, RequestOutput, SamplingParams


PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}  # TIFF has the others


def generate(
    llm: "LLM",
    prompts: Sequence[list[int]],
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
        salt (`str`):
            Salt of vLLM's prefix cache, which no other weights have.
        params (`SamplingParams` or `list[SamplingParams]`):
            Sampling parameters, of each prompt or of all.
        options:
            Keyword arguments of vLLM's `generate`.

    Raises:
        `ValueError`: If vLLM makes other tokens of a prompt with images than the processor.
    """
    # What the vision tower makes of an image is cached by the image alone, whatever the salt
    llm.llm_engine.reset_encoder_cache()
    outputs = llm.generate([_as_input(prompt, salt) for prompt in prompts], params, **options)
    for prompt, output in zip(prompts, outputs, strict=True):
        check_tokens(prompt, output.prompt_token_ids)
    return outputs


def _as_input(prompt: list[int], salt: str) -> dict[str, Any]:
    if not isinstance(prompt, ImagePrompt):
        return {"prompt_token_ids": prompt, "cache_salt": salt}
    return _with_images(prompt.text_ids, prompt.images, salt)


def _with_images(text_ids: list[int], images: "list[Image]", salt: str) -> dict[str, Any]:
    # vLLM processes the images by itself, and puts in as many tokens as they take
    return {"prompt_token_ids": text_ids, "multi_modal_data": {"image": images}, "cache_salt": salt}


def check_tokens(expected: list[int], found: list[int]) -> None:
    """
    Raises:
        `ValueError`: If what vLLM made of a prompt has other tokens than what the processor made of it.
    """
    if found != list(expected):
        raise ValueError(
            f"vLLM makes other tokens of a prompt with images ({len(found)}) than the processor ({len(expected)}): "
            "the model would not see what it is trained on. Set use_vllm=False."
        )


def has_processor(source: str, processing_class: PreTrainedTokenizerBase | ProcessorMixin, args: ESConfig) -> bool:
    """
    Whether vLLM processes images as the trainer does if it loads the model, and with it the processor, by its name.

    Args:
        source (`str`):
            Name or folder of the model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            The trainer's.
        args ([`ESConfig`]):
            Says which files the name means.
    """
    if not isinstance(processing_class, ProcessorMixin):
        return True
    options = args.model_init_kwargs or {}
    theirs = AutoProcessor.from_pretrained(
        source,
        revision=options.get("revision"),
        trust_remote_code=args.trust_remote_code or options.get("trust_remote_code", False),
    )
    return theirs.to_dict() == processing_class.to_dict()


# ---- in requests to servers ----


def as_json(prompt: list[int]) -> list[int] | dict[str, Any]:
    """A prompt as a server is sent it: its images are in files of formats that lose nothing, as base64."""
    if not isinstance(prompt, ImagePrompt):
        return prompt
    return {"ids": list(prompt), "text_ids": prompt.text_ids, "images": [_to_text(image) for image in prompt.images]}


def from_json(prompt: list[int] | dict[str, Any], salt: str) -> tuple[list[int], dict[str, Any]]:
    """The tokens of a prompt that was sent to a server, and the prompt as vLLM takes it."""
    if isinstance(prompt, list):
        return prompt, {"prompt_token_ids": prompt, "cache_salt": salt}
    return prompt["ids"], _with_images(prompt["text_ids"], [_from_text(image) for image in prompt["images"]], salt)


def _to_text(image: "Image") -> str:
    file = io.BytesIO()
    image.save(file, "PNG" if image.mode in PNG_MODES else "TIFF")
    return base64.b64encode(file.getvalue()).decode()


def _from_text(text: str) -> "Image":
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image
