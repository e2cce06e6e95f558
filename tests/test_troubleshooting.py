"""The messages of docs/troubleshooting.md are those of the package."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import es_trainer


PACKAGE = Path(es_trainer.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
ANY = "…"
MESSAGES = [found[2] for found in re.finditer(r"^#### (`+ ?)(.+?)( ?`+)$", PAGE.read_text(), re.MULTILINE)]


@cache
def texts() -> list[str]:
    """The texts of the package; what is put into them when they are made is `ANY`."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else ANY for part in node.values)
                found.append(re.sub(f"{ANY}+", ANY, "".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_there_are_messages():
    assert len(MESSAGES) > 40 and len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_message_is_one_of_the_package(message):
    assert any(message.removesuffix(ANY).rstrip() in text for text in texts())
