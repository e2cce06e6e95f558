"""What mkdocstrings reads of docstrings in the form of Hugging Face's."""

import re
from typing import Any

import griffe


# [`ESTrainer`], [`~transformers.Trainer`] and [`evaluate_reward`]: names, of which the last part is shown after a tilde
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?!\()")


def plain(text: str) -> str:
    """Text with references as plain names."""
    return REFERENCE.sub(lambda found: f"`{found[2].rsplit('.', 1)[-1] if found[1] else found[2]}`", text)


class PlainReferences(griffe.Extension):
    """References of docstrings as plain names, and types of arguments without their backticks."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
