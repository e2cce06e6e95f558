"""Copies of dataset rows for functions of the user, which may change what they get."""

from typing import Any


def own_copy(value: Any) -> Any:
    """
    The value with new lists, dicts, sets and tuples at every depth.

    Whatever else is in them is shared: texts and numbers cannot be changed, and images, tensors and arrays may be too
    large to be copied for every call.
    """
    if type(value) is dict:
        return {key: own_copy(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(own_copy, value))
    if type(value) is set:
        return set(value)
    return value
