"""The parts of pages that are made of the code: fields of `ESConfig`, and the help of commands."""

import inspect
import io
import os
import re
from contextlib import redirect_stdout
from dataclasses import fields
from textwrap import dedent
from unittest.mock import patch

from docstrings import plain

from es_trainer import ESConfig
from es_trainer.cli import COMMANDS, main
from es_trainer.fields import REFUSED, WITH_EFFECT, default, without_effect


ENTRY = re.compile(r"^(\w+) \((.*)\):$", re.MULTILINE)
PAGE = re.compile(r"\bdocs/(\w+\.md)")
OWN = frozenset(vars(ESConfig)["__annotations__"])


def fields_of_evolution() -> str:
    """The fields that `ESConfig` describes in its docstring, in the groups and with the texts that they have there."""
    lines = []
    for line in _parameters().splitlines():
        title = re.fullmatch(r"> Parameters (?:that control |of )(.*)", line)
        entry = ENTRY.fullmatch(line)
        if title:
            lines.append("### " + re.sub("^[a-z](?=[a-z])", lambda first: first[0].upper(), title[1]))
        elif entry:
            lines += [f"#### `{entry[1]}` {{ #{entry[1]} }}", "", entry[2]]
        else:
            lines.append(line.removeprefix("    "))
        if title or entry:
            lines.append("")
    return PAGE.sub(r"[\1](\1)", plain("\n".join(lines)))


def other_defaults() -> str:
    """Which defaults are others than those of `TrainingArguments`."""
    text = inspect.getdoc(ESConfig).split("> [!NOTE]\n", 2)[1].split("\n\n", 1)[0]
    first, *rest = (line.removeprefix("> ") for line in text.splitlines())
    return plain("\n".join([first, "", *rest]))


def inherited_fields() -> str:
    """Fields of other configs that have an effect, in a table."""
    rows = [
        (item.name, _value(default(item)), _cell(item.metadata.get("help", "")))
        for item in fields(ESConfig)
        if item.name in WITH_EFFECT or item.name in OWN and item.name not in described()
    ]
    return _table(("field", "default", ""), [(f"`{name}`", value, text) for name, value, text in rows])


def fields_without_effect() -> str:
    """Fields that are accepted or refused, and what to use instead."""
    ignored = [
        (f"`{name}`", "left out, with a warning", _cell(text or "it is about GRPO's loss"))
        for name, text in without_effect(OWN).items()
    ]
    refused = [(f"`{name}`", "an error", _cell(text)) for name, text in REFUSED.items()]
    return _table(("field", "if it is set", "because, or instead"), sorted(refused) + sorted(ignored))


def described() -> set[str]:
    """Names of the fields that the docstring of `ESConfig` describes."""
    return {name for name, _ in ENTRY.findall(_parameters())}


def _parameters() -> str:
    """The part of the docstring of `ESConfig` that describes fields."""
    return dedent(inspect.getdoc(ESConfig).split("Parameters:\n", 1)[1].split("\n> [!NOTE]", 1)[0])


def help_of_commands() -> str:
    """What `es-trainer COMMAND --help` prints."""
    parts = []
    for command, summary in COMMANDS.items():
        sentence = f"{summary[0].upper()}{summary[1:]}."
        parts.append(f"## es-trainer {command}\n\n{sentence}\n\n```text\n{_help(command)}\n```")
    return "\n\n".join(parts)


def _help(command: str) -> str:
    with patch.dict(os.environ, COLUMNS="100"), redirect_stdout(io.StringIO()) as printed:
        try:
            main([command, "--help"])
        except SystemExit as end:
            if end.code != 0:
                raise
    return printed.getvalue().strip()


def _value(value: object) -> str:
    return f"`{getattr(value, 'value', value)!r}`"


def _cell(text: str) -> str:
    """A text for a cell of a table: one line, and no sign of a new cell."""
    return " ".join(plain(text).split()).replace("|", r"\|").replace("<", "&lt;")


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ("---",) * len(titles), *rows])


# By the name that a marker in a page gives
PARTS = {
    "fields of evolution strategies": fields_of_evolution,
    "other defaults": other_defaults,
    "inherited fields": inherited_fields,
    "fields without effect": fields_without_effect,
    "help of commands": help_of_commands,
}
