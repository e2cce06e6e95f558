"""The parts of the site that are made of the code are whole."""

import re
import sys
from dataclasses import fields

import pytest
from pages import PAGES, ROOT

from es_trainer import ESConfig
from es_trainer.cli import COMMANDS


sys.path.append(str(ROOT / "docs" / "site"))

from generated import (  # noqa: E402
    PARTS,
    fields_of_evolution,
    fields_without_effect,
    help_of_commands,
    inherited_fields,
    other_defaults,
)


def test_every_field_is_described_once():
    described = re.findall(r"^#### `(\w+)`", fields_of_evolution(), re.MULTILINE)
    for table in (inherited_fields(), fields_without_effect()):
        described += re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert sorted(described) == sorted(item.name for item in fields(ESConfig) if item.init)


def test_a_field_has_its_default_and_its_text():
    sigma = "#### `sigma` { #sigma }\n\n`float`, *optional*, defaults to `1e-3`\n\nStandard deviation of the noise"
    assert sigma in fields_of_evolution()
    assert "| `fsdp` | an error | FSDP is not supported." in fields_without_effect()
    assert "| `learning_rate` | `0.0005` |" in inherited_fields()
    assert "\n\n- `learning_rate`: Defaults to `5e-4` instead of `5e-5`.\n" in other_defaults()


def test_every_command_shows_its_help():
    sections = dict(re.findall(r"^## es-trainer (\S+)\n\n.*?```text\n(.*?)```", help_of_commands(), re.M | re.S))
    assert sections.keys() == COMMANDS.keys()
    assert all(f"es-trainer {name}" in text for name, text in sections.items())


@pytest.mark.parametrize("part", PARTS)
def test_a_page_has_each_part(part):
    assert sum(f"<!-- generated: {part} -->" in page.read_text() for page in PAGES.values()) == 1
