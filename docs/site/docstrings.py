"""Docstrings in the form of Hugging Face's, as Markdown and mkdocstrings read them."""

import re


# [`ESTrainer`] and [`~transformers.Trainer`]: names, of which the last part is shown after a tilde
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?!\()")


# `name (`str`, *optional*, defaults to `"x"`):`; the signature has the default
ARGUMENT = re.compile(r"^( *\w+) \((.*?)(?:, \*optional\*.*)?\):$", re.MULTILINE)
RESULT = re.compile(r"^( +)`([\w.\[\], |]+)`: ", re.MULTILINE)


def plain(text: str) -> str:
    """Text with references as plain names."""
    return REFERENCE.sub(lambda found: f"`{found[2].rsplit('.', 1)[-1] if found[1] else found[2]}`", text)


def with_plain_types(text: str) -> str:
    """A docstring whose types have no backticks, so that they are read as types."""
    text = ARGUMENT.sub(lambda found: f"{found[1]} ({found[2].replace('`', '')}):", text)
    return RESULT.sub(r"\1\2: ", text)
