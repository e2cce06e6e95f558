"""Values of fields as the types that they are declared with, whatever they were read from."""

import contextlib
import json
import math
import os
from enum import Enum
from types import FunctionType, MethodType, UnionType
from typing import Any, Union, get_args, get_origin

import numpy as np
import torch
from transformers.utils import get_json_schema

from .choices import OF_SIGMA


WORDS = {"true": True, "false": False}


class InSigmas(float):
    """
    A number that was given as a multiple of sigma, such as `"sigma/2"` or `"0.5 * sigma"`.

    Args:
        ratio (`float`):
            The multiple.
        sigma (`float`):
            Sigma.
    """

    ratio: float

    def __new__(cls, ratio: float, sigma: float) -> "InSigmas":
        number = super().__new__(cls, ratio * sigma)
        number.ratio = ratio
        return number

    def __reduce__(self):
        return InSigmas, (self.ratio, float(self) / self.ratio)


def in_sigmas(text: str, sigma: float) -> InSigmas | None:
    """The number that a multiple of sigma is, or `None` if the text is none."""
    found = OF_SIGMA.fullmatch(text.strip())
    if found is None or (found[2] == "/" and not float(found[3])):
        return None
    factor, operator, other = found[1] or "1", found[2], found[3] or "1"
    return InSigmas(float(factor) / float(other) if operator == "/" else float(factor) * float(other), sigma)


def plain(value: Any) -> Any:
    """The numbers and lists of numpy and torch as Python's, also inside of lists and dictionaries."""
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {key: plain(inner) for key, inner in value.items()}
    return value


def converted(name: str, value: Any, hint: Any) -> Any:
    """
    A value as its field declares it: `"1e-3"` as the number that it is, `4.0` as the integer.

    Args:
        name (`str`):
            The field.
        value (`Any`):
            What it was given.
        hint (`Any`):
            Its type, as `typing.get_type_hints` gives it.

    Raises:
        `ValueError`: If the field takes nothing like it; names the field.
    """
    value = plain(value)
    kinds = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
    if value is None and type(None) in kinds:
        return value
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            return _as_choice(name, value, kind)
        if kind == dict[str, Any]:
            return _as_dict(name, value)
    if kinds <= {str, type(None)}:
        return _as_text(name, value)
    if str in kinds:
        return value
    for kind in (bool, int, float):
        if kind in kinds:
            return _as_number(name, value, kind)
    for kind in kinds:
        if kind == list[float]:
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"`{name}={value!r}` is not valid: give a list of numbers.")
            return [_as_number(name, number, float) for number in value]
    return value


def _as_choice(name: str, value: Any, kind: type[Enum]) -> Enum:
    choices = [choice.value for choice in kind]
    if value is False and "no" in choices:  # what YAML makes of `no`
        value = "no"
    if not isinstance(value, (str, kind)) or value not in choices:
        raise ValueError(f"`{name}={value!r}` is not valid: choose one of {', '.join(map(repr, choices))}.")
    return kind(value)


def _as_dict(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"`{name}={value!r}` is not valid: it is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{name}={value!r}` is not valid: give a dictionary, as JSON on the command line.")
    return value


def _as_text(name: str, value: Any) -> Any:
    if isinstance(value, (str, os.PathLike)):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):  # YAML's `run_name: 5`
        return str(value)
    raise ValueError(f"`{name}={value!r}` is not valid: it must be text.")


def _as_number(name: str, value: Any, kind: type) -> Any:
    if kind is bool:
        if isinstance(value, str):
            value = WORDS.get(value.lower(), value)
        if value in (True, False) and isinstance(value, (bool, int)):
            return bool(value)
        raise ValueError(f"`{name}={value!r}` is not valid: it must be True or False.")
    number = _parsed(value) if isinstance(value, str) else value
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"`{name}={value!r}` is not valid: it must be finite.")
    if kind is int and isinstance(number, float) and number.is_integer():
        return int(number)
    if isinstance(number, (int, kind)) and not isinstance(number, bool):
        return number
    raise ValueError(f"`{name}={value!r}` is not valid: it must be {'an integer' if kind is int else 'a number'}.")


def _parsed(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def with_schemas(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a chat template, with the schemas of functions among the `tools`, which templates take as well."""
    if not isinstance(options.get("tools"), (list, tuple)):
        return options
    functions = (FunctionType, MethodType)
    return {
        **options,
        "tools": [get_json_schema(tool) if isinstance(tool, functions) else tool for tool in options["tools"]],
    }
