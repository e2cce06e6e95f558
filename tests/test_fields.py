"""Every field of TrainingArguments is decided upon."""

from dataclasses import fields

from transformers import TrainingArguments

from es_trainer import ESConfig
from es_trainer.config import NEEDS
from es_trainer.fields import REFUSED, WITH_EFFECT, WITHOUT_EFFECT


def test_every_field_of_training_arguments_is_decided_upon():
    """A field that is new has to be put into one of the three: it works, it has no effect, or it is refused."""
    inherited = {item.name for item in fields(TrainingArguments) if item.init}
    assert inherited - WITH_EFFECT - WITHOUT_EFFECT.keys() - REFUSED.keys() == set()


def test_a_field_is_in_one_table_only():
    assert not WITH_EFFECT & WITHOUT_EFFECT.keys()
    assert not WITH_EFFECT & REFUSED.keys()
    assert not WITHOUT_EFFECT.keys() & REFUSED.keys()


def test_what_needs_other_fields_has_an_effect_beside_them():
    known = {item.name for item in fields(ESConfig)}
    assert NEEDS.keys() <= known - WITHOUT_EFFECT.keys() - REFUSED.keys()


def test_what_the_config_defines_itself_has_an_effect():
    assert not vars(ESConfig)["__annotations__"].keys() & WITHOUT_EFFECT.keys()
