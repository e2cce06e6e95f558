"""Rewards by the verifiers of reasoning-gym, and the column in which a dataset holds what a verifier reads."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .text import completion_text


if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset


def verifier(generator: "ProceduralDataset", name: str) -> Callable[..., list[float]]:
    """
    Turns the verifier of a generator of reasoning-gym into a reward function.

    It reads the dataset column `entry`, as [`entry_to_json`] writes it. The answer is what stands in the last
    `<answer>...</answer>` of a completion. A completion without one gets what the verifier gives for no answer, which
    is 0.0 for nearly all of them.

    Args:
        generator ([`~reasoning_gym.dataset.ProceduralDataset`]):
            Generator, with the configuration with which the entries were made: some verifiers depend on it.
        name (`str`):
            Name of the reward function, under which the trainer logs it.

    Returns:
        `Callable[..., list[float]]`:
            Reward function. Its rewards are from 0.0 to 1.0.
    """
    from reasoning_gym.utils import extract_answer  # here because it takes seconds to import

    def reward(completions: list[str | list[dict[str, str]]], entry: list[str], **kwargs: Any) -> list[float]:
        answers = [extract_answer(completion_text(completion)) for completion in completions]
        return [_score(generator, answer, entry_from_json(text)) for answer, text in zip(answers, entry, strict=True)]

    reward.__name__ = name
    return reward


def _score(generator: "ProceduralDataset", answer: str | None, entry: dict[str, Any]) -> float:
    try:
        return float(generator.score_answer(answer, entry))
    except Exception:  # some verifiers raise all kinds of errors if the answer has not the form that they expect
        return 0.0


def entry_to_json(entry: dict[str, Any]) -> str:
    """
    What a generator made, as JSON.

    Args:
        entry (`dict[str, Any]`):
            Item of a [`~reasoning_gym.dataset.ProceduralDataset`]. Tuples, and keys that are not strings, are kept as
            such: verifiers compare them. Other objects become strings.

    Returns:
        `str`: JSON, for [`entry_from_json`].
    """
    return json.dumps(_tagged(entry), default=str)  # some metadata has fractions, which verifiers do not read


def entry_from_json(text: str) -> dict[str, Any]:
    """
    What a generator made, from JSON.

    Args:
        text (`str`):
            What [`entry_to_json`] returned.

    Returns:
        `dict[str, Any]`: The entry.
    """
    return json.loads(text, object_hook=_untagged)


def _tagged(value: Any) -> Any:
    """The value with objects in place of what JSON does not have."""
    match value:
        case tuple():
            return {"__tuple__": [_tagged(item) for item in value]}
        case list():
            return [_tagged(item) for item in value]
        case dict() if not all(isinstance(key, str) for key in value):
            return {"__dict__": [[_tagged(key), _tagged(item)] for key, item in value.items()]}
        case dict():
            return {key: _tagged(item) for key, item in value.items()}
        case _:
            return value


def _untagged(value: dict[str, Any]) -> Any:
    match value:
        case {"__tuple__": items}:
            return tuple(items)
        case {"__dict__": items}:
            return dict(items)
        case _:
            return value
