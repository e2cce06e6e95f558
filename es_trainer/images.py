"""Images of dataset rows: in columns of their own, or in the messages of prompts."""

import zlib
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from datasets import Image
from trl.data_utils import prepare_multimodal_messages


IMAGE_COLUMNS = ("image", "images")  # TRL's names


def with_images(row: Mapping[str, Any], prompt: Any) -> Any:
    """
    The prompt of a row with the images of the row in its messages, as TRL puts them there.

    Args:
        row (`Mapping[str, Any]`):
            The row. Its column `"image"` has one image or `None`, and its column `"images"` a list of them, or `None`.
        prompt (`str` or `list[dict[str, Any]]`):
            Its prompt.

    Raises:
        `ValueError`: If the prompt is no list of messages, or has not as many places for images as there are images.
    """
    has_column = any(column in row for column in IMAGE_COLUMNS)
    if not has_column and not any(True for _ in _parts(prompt)):
        return prompt
    images = _of_columns(row)
    if isinstance(prompt, str):
        if not images:
            return prompt
        raise ValueError(
            "a row has images, but its prompt is a text: images need conversational prompts, lists of messages with "
            "'role' and 'content'."
        )
    messages = [with_loaded_images(message) for message in prompt]
    return prepare_multimodal_messages(messages, images) if has_column else messages


def _of_columns(row: Mapping[str, Any]) -> list[Any]:
    # As in TRL, "images" goes before "image"
    if "images" in row:
        images = row["images"]
        return [] if images is None else [load(image) for image in images]
    return [load(row["image"])] if row.get("image") is not None else []


def with_loaded_images(message: dict[str, Any]) -> dict[str, Any]:
    """The message with images to be looked at, and without the keys that a dataset gives to parts of other types."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = [{key: value for key, value in part.items() if value is not None} for part in content]
    return {**message, "content": [{**p, "image": load(p["image"])} if "image" in p else p for p in parts]}


def load(image: Any) -> Any:
    """An image to be looked at (`PIL.Image.Image`), of a path, of bytes or of what datasets make of these."""
    if not isinstance(image, (str, bytes, dict)):
        return image
    kind = Image()
    return kind.decode_example(image if isinstance(image, dict) else kind.encode_example(image))


def _parts(prompt: Any) -> Iterator[dict[str, Any]]:
    """Those parts of messages that have a type."""
    for message in prompt if isinstance(prompt, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        yield from content if isinstance(content, list) else []


def images_of(prompt: Any) -> list[Any]:
    """The images in the messages of a prompt."""
    return [part["image"] for part in _parts(prompt) if part.get("type") == "image" and "image" in part]


def with_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with lists of parts for texts, as chat templates of models that read images expect them."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def text_of(content: str | list[dict[str, Any]]) -> str:
    """The text of a message's content, with the kinds of its other parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or f"<{part['type']}>" for part in content if part.get("text") != "")


def as_bytes(image: Any) -> dict[str, Any]:
    """An image as datasets store it: a file's bytes."""
    return Image().encode_example(image)


def without_images(prompt: Any) -> Any:
    """The prompt with `{"type": "image"}` in place of each image."""
    if not images_of(prompt):
        return prompt
    return [
        {
            **message,
            "content": [{"type": "image"} if part.get("type") == "image" else part for part in _parts([message])],
        }
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def comparable(value: Any) -> Hashable:
    """What is the same for the same value in another process: images stand for their pixels."""
    if isinstance(value, dict):
        return tuple((key, comparable(entry)) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(comparable, value))
    if isinstance(value, (str, int, float, bytes, type(None))):
        return value
    if hasattr(value, "tobytes"):  # of PIL, NumPy
        return f"{type(value).__name__} {value.size} {zlib.crc32(value.tobytes())}"
    return repr(value)
