"""Prompts with images: their tokens, and what a model reads beside these."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from transformers import ProcessorMixin

from ..images import comparable, images_of, with_parts


class ImagePrompt(list[int]):
    """
    A prompt with images. It is the list of its tokens, as any other prompt is, which also has what they were made of.

    Args:
        ids (`list[int]`):
            Tokens, with those that stand for images.
        text (`str`):
            What the chat template made of the messages.
        text_ids (`list[int]`):
            Tokens of that text, before those for images become as many as these take.
        images (`list[PIL.Image.Image]`):
            The images, in the order in which they stand in the text.
        batches (`dict`):
            Takes what a model reads of batches of this prompt and others that were encoded together.
    """

    def __init__(
        self,
        ids: list[int],
        text: str,
        text_ids: list[int],
        images: list[Any],
        batches: dict[tuple[int, ...], Any],
    ):
        super().__init__(ids)
        self.text = text
        self.text_ids = text_ids
        self.images = images
        self.batches = batches


def identity(prompt: list[int]) -> Hashable:
    """What is the same for prompts with the same tokens and images."""
    images = comparable(prompt.images) if isinstance(prompt, ImagePrompt) else ()
    return tuple(prompt), images


class ImageTemplate:
    """
    Makes prompts of messages with a processor.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Has the chat template, the tokenizer and an image processor.
        options (`dict[str, Any]`):
            Variables of the chat template.
    """

    def __init__(self, processor: ProcessorMixin, options: dict[str, Any]):
        self.processor = processor
        self.options = options

    def encode(self, conversations: list[list[dict[str, Any]]], first_row: int = 0) -> list[list[int]]:
        """
        Tokens of conversations; of those with images, an [`ImagePrompt`].

        Args:
            conversations (`list`):
                Lists of messages.
            first_row (`int`, *optional*, defaults to `0`):
                Number of the first one, for errors.

        Raises:
            `ValueError`: If the processor refuses one.
        """
        batches: dict[tuple[int, ...], Any] = {}
        prompts: list[list[int]] = []
        for row, messages in enumerate(conversations, first_row):
            try:
                messages = with_parts(messages)
                text = self.processor.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False, **self.options
                )
                images = images_of(messages)
                ids = self._process([text], [images] if images else None)["input_ids"][0].tolist()
            except ValueError as error:
                raise ValueError(f"Prompt {row}: {error}") from error
            if images:
                text_ids = self.processor.tokenizer(text, **self._special_tokens(text))["input_ids"]
                ids = ImagePrompt(ids, text, text_ids, images, batches)
            prompts.append(ids)
        return prompts

    def inputs(self, prompts: Sequence[ImagePrompt]) -> dict[str, torch.Tensor]:
        """
        What the model reads of a batch of prompts beside their tokens, such as `pixel_values`. What is about tokens is
        padded on the left.

        Args:
            prompts (`Sequence[ImagePrompt]`):
                The prompts, all of them with images.

        Raises:
            `RuntimeError`: If the processor makes other tokens of a prompt than before.
        """
        batches, key = prompts[0].batches, tuple(map(id, prompts))
        if key not in batches:
            fields = self._process([prompt.text for prompt in prompts], [prompt.images for prompt in prompts])
            mask = fields.pop("attention_mask").bool()
            for prompt, ids, own in zip(prompts, fields.pop("input_ids"), mask, strict=True):
                if ids[own].tolist() != list(prompt):
                    raise RuntimeError(
                        f"The processor ({type(self.processor).__name__}) makes other tokens of a prompt in a batch "
                        "than of the prompt alone. Set generation_batch_size=1."
                    )
            batches[key] = fields
        return batches[key]

    def _special_tokens(self, text: str) -> dict[str, bool]:
        # As `apply_chat_template` does that makes tokens
        begin = self.processor.tokenizer.bos_token
        return {"add_special_tokens": False} if begin is not None and text.startswith(begin) else {}

    def _process(self, texts: list[str], images: list[list[Any]] | None) -> dict[str, torch.Tensor]:
        return dict(
            self.processor(
                text=texts,
                images=images,
                padding=True,
                padding_side="left",
                return_tensors="pt",
                **self._special_tokens(texts[0]),
            )
        )
