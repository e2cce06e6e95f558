"""Prompts with images: their tokens, and what a model reads beside these."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import ProcessorMixin

from ..images import comparable, images_of, with_parts


class Written(NamedTuple):
    """
    What a chat template has written of a prompt.

    Args:
        text (`str`):
            What it made of messages.
        first (`int`):
            Number of the first token of the text in the prompt.
        length (`int`):
            Number of its tokens, with those that stand for images.
    """

    text: str
    first: int
    length: int


class ImagePrompt(list[int]):
    """
    A prompt with images. It is the list of its tokens, as any other prompt is, which also has what they were made of.

    Args:
        ids (`list[int]`):
            Tokens, with those that stand for images.
        written (`Sequence[Written]`):
            What the chat template wrote, in the order of the tokens. The model wrote the rest in earlier turns.
        text_ids (`list[int]`):
            Tokens of all text, before those for images become as many as these take.
        images (`list[PIL.Image.Image]`):
            The images, in the order in which they stand in the text.
        batches (`dict`):
            Takes what a model reads of batches of this prompt and others that were encoded together.
    """

    def __init__(
        self,
        ids: list[int],
        written: Sequence[Written],
        text_ids: list[int],
        images: list[Any],
        batches: dict[tuple[int, ...], Any],
    ):
        super().__init__(ids)
        self.written = written
        self.text_ids = text_ids
        self.images = images
        self.batches = batches


def joined(parts: Sequence[list[int]]) -> list[int]:
    """
    A prompt in parts, such as the turns of a conversation.

    Args:
        parts (`Sequence[list[int]]`):
            [`ImagePrompt`]s, of which some may have no images, and tokens that the model wrote.

    Returns:
        `list[int]`: An [`ImagePrompt`] if a part has images, or else the tokens.
    """
    ids = [token for part in parts for token in part]
    with_texts = [part for part in parts if isinstance(part, ImagePrompt)]
    images = [image for part in with_texts for image in part.images]
    if not images:
        return ids
    written, first = [], 0
    for part in parts:
        if isinstance(part, ImagePrompt):
            written += [each._replace(first=first + each.first) for each in part.written]
        first += len(part)
    text_ids = [token for part in parts for token in (part.text_ids if isinstance(part, ImagePrompt) else part)]
    return ImagePrompt(ids, written, text_ids, images, {})


def following(prompt: ImagePrompt, beginning: str, tokens: int) -> ImagePrompt:
    """
    The rest of a prompt.

    Args:
        prompt ([`ImagePrompt`]):
            One text, with all images in the rest.
        beginning (`str`):
            The text to leave out.
        tokens (`int`):
            The number of its tokens.
    """
    (written,) = prompt.written
    rest = prompt[tokens:]
    text = written.text.removeprefix(beginning)
    return ImagePrompt(rest, [Written(text, 0, len(rest))], prompt.text_ids[tokens:], prompt.images, {})


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
        placeholder (`int`):
            The token in whose place the model reads pieces of images.
    """

    def __init__(self, processor: ProcessorMixin, options: dict[str, Any], placeholder: int):
        self.processor = processor
        self.options = options
        self.placeholder = placeholder

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
                prompt = self.write(messages, batches, add_generation_prompt=True, **self.options)
            except ValueError as error:
                raise ValueError(f"Prompt {row}: {error}") from error
            prompts.append(prompt if prompt.images else list(prompt))
        return prompts

    def write(
        self, messages: list[dict[str, Any]], batches: dict[tuple[int, ...], Any], **options: Any
    ) -> ImagePrompt:
        """
        Messages as a prompt, which may have no images.

        Args:
            messages (`list[dict[str, Any]]`):
                The messages.
            batches (`dict`):
                That of the prompt.
            options:
                Keyword arguments of the chat template.
        """
        messages = with_parts(messages)
        text = self.processor.apply_chat_template(messages, tokenize=False, **options)
        images = images_of(messages)
        ids = self._process([text], [images] if images else None)["input_ids"][0].tolist()
        text_ids = self.processor.tokenizer(text, **self._special_tokens(text))["input_ids"]
        return ImagePrompt(ids, [Written(text, 0, len(ids))], text_ids, images, batches)

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
            batches[key] = self._inputs(prompts)
        return batches[key]

    def _inputs(self, prompts: Sequence[ImagePrompt]) -> dict[str, torch.Tensor]:
        # A special token keeps tokens of one text from being merged with those of the next
        end = self.processor.tokenizer.eos_token
        texts = [end.join(each.text for each in prompt.written) for prompt in prompts]
        fields = self._process(texts, [prompt.images for prompt in prompts])
        mask = fields.pop("attention_mask").bool()
        for prompt, ids, own in zip(prompts, fields.pop("input_ids"), mask, strict=True):
            found, sources = ids[own].tolist(), _sources(prompt)
            expected = [prompt[each.first : each.first + each.length] for each in prompt.written]
            if [found[source] for source in sources] != expected or len(found) != sources[-1].stop:
                raise RuntimeError(
                    f"The processor ({type(self.processor).__name__}) makes other tokens of a prompt in a batch "
                    "than of the prompt alone. Set generation_batch_size=1."
                )
        about_tokens = {name: values for name, values in fields.items() if values.shape == mask.shape}
        return fields | {name: _placed(values, mask, prompts) for name, values in about_tokens.items()}

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


def _sources(prompt: ImagePrompt) -> list[slice]:
    """Which tokens each text of a prompt has among those of all, with another token between two of them."""
    found, first = [], 0
    for each in prompt.written:
        found.append(slice(first, first + each.length))
        first += each.length + 1
    return found


def _placed(values: torch.Tensor, mask: torch.Tensor, prompts: Sequence[ImagePrompt]) -> torch.Tensor:
    """Numbers of the tokens of texts as numbers of the prompts' tokens, padded on the left. The model's have 0."""
    placed = values.new_zeros(len(prompts), max(map(len, prompts)))
    for row, own, valid, prompt in zip(placed, values, mask, prompts, strict=True):
        offset = placed.shape[1] - len(prompt)
        for source, each in zip(_sources(prompt), prompt.written, strict=True):
            first = offset + each.first
            row[first : first + each.length] = own[valid][source]
    return placed
