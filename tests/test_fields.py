"""Every field of the config is decided upon."""

import inspect
from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl import TrlParser

from es_trainer import ESConfig
from es_trainer.fields import REFUSED, WITH_EFFECT, WITHOUT_EFFECT, Help, about, known_of, same_in


OWN = vars(ESConfig)["__annotations__"].keys()


def test_every_field_of_training_arguments_is_decided_upon():
    """A field that is new has to be put into one of the three: it works, it has no effect, or it is refused."""
    inherited = {item.name for item in fields(TrainingArguments) if item.init}
    assert inherited - WITH_EFFECT.keys() - OWN - WITHOUT_EFFECT.keys() - REFUSED.keys() == set()


def test_every_own_field_says_who_must_share_it():
    assert "same_in" in inspect.signature(about).parameters  # without a default: none can be forgotten
    assert inspect.signature(about).parameters["same_in"].default is inspect.Parameter.empty
    texts = {item.name: item.metadata["help"] for item in fields(ESConfig) if item.name in OWN}
    assert [name for name, text in texts.items() if not isinstance(text, Help)] == []
    assert {text.about.same_in for text in texts.values()} == {"nobody", "processes", "run"}


def test_a_field_is_in_one_table_only():
    assert not WITH_EFFECT.keys() & WITHOUT_EFFECT.keys()
    assert not WITH_EFFECT.keys() & REFUSED.keys()
    assert not WITHOUT_EFFECT.keys() & REFUSED.keys()
    assert not WITH_EFFECT.keys() & OWN


def test_what_the_config_defines_itself_has_an_effect():
    assert not OWN & WITHOUT_EFFECT.keys()


def test_what_resumed_runs_and_processes_share():
    run, processes = same_in(ESConfig, "run"), same_in(ESConfig, "processes")
    assert {"seed", "sigma", "learning_rate", "weight_decay", "generation_kwargs", "bf16"} <= set(run)
    assert {"max_steps", "save_steps", "use_vllm", "ds3_gather_for_generation"} <= set(processes)
    assert not set(run) & set(processes) and len(set(run)) == len(run)
    assert "output_dir" not in {*run, *processes}


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_parsers_show_the_help_alone(parser, tmp_path):
    options = parser(ESConfig)._option_string_actions
    assert options["--sigma"].help == str(known_help("sigma")) and "same_in" not in options["--sigma"].help


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_parsers_set_nothing_by_themselves(parser, tmp_path, caplog):
    parser(ESConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert "are left out" not in caplog.text


def known_help(name: str) -> str:
    assert known_of(ESConfig)[name].same_in == "run"
    return next(item.metadata["help"] for item in fields(ESConfig) if item.name == name)
