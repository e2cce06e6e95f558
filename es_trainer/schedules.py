"""Settings that change after a number of steps, such as `{50: 16, 100: 32}`."""

import itertools
import math
from typing import Any

import yaml


def as_schedule(name: str, value: Any) -> dict[int, int] | None:
    """
    A schedule as numbers by steps, in their order.

    Args:
        name (`str`):
            The field.
        value (`dict` or `str`, *optional*):
            What it was given: a dict, or one as YAML or JSON write it.

    Returns:
        `dict[int, int]`: `None` if there are no steps in it.

    Raises:
        `ValueError`: If it is no such thing; names the field.
    """
    # Imported where it is used: it imports torch, which plots do without
    from .values import converted

    given = value
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            value = None
    if given is not None and not isinstance(value, dict):
        raise ValueError(f"`{name}={given!r}` is not valid: give numbers by steps, such as {{50: 16, 100: 32}}.")
    numbers = [(converted(name, step, int), converted(name, number, int)) for step, number in (value or {}).items()]
    return dict(sorted(numbers)) or None


def value_after(steps: int, first: int, schedule: dict[int, int] | None) -> int:
    """The number that a setting, which is `first` at the start, has after so many steps."""
    return [first, *(number for step, number in (schedule or {}).items() if step <= steps)][-1]


def largest_of(first: int, schedule: dict[int, int] | None) -> int:
    """The largest number that a setting, which is `first` at the start, has."""
    return max([first, *(schedule or {}).values()])


def total_of(steps: int, *settings: tuple[int, dict[int, int] | None]) -> int:
    """The sum over so many steps of the product of settings, given the first number and the schedule of each."""
    starts = sorted({0, *(start for _, schedule in settings for start in schedule or {})})
    return sum(
        math.prod(value_after(start, *setting) for setting in settings) * max(0, min(steps, end) - start)
        for start, end in itertools.pairwise([*starts, math.inf])
    )
