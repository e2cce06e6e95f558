"""An extension of griffe, by which mkdocstrings reads docstrings."""

from typing import Any

import griffe
from docstrings import plain, with_plain_types


class PlainReferences(griffe.Extension):
    """Docstrings with plain names for references, and plain types."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_plain_types(plain(obj.docstring.value))
