"""What ESTrainer overrides of the Trainer is still there, called, and called with the same arguments."""

import inspect

import pytest
from transformers import Trainer, trainer

from es_trainer import ESTrainer


# Private methods of the Trainer that are overridden. A release that renames one of them would leave ours uncalled.
PRIVATE = {
    "_build_accelerator_args",
    "_finish_current_push",
    "_get_dataloader",
    "_init_training_state",
    "_issue_warnings_after_load",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_move_model_to_device",
    "_prepare_for_training",
    "_push_from_checkpoint",
    "_save",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "_set_signature_columns_if_needed",
}
PUBLIC = {
    "create_optimizer",
    "create_scheduler",
    "evaluation_loop",
    "floating_point_ops",
    "get_batch_samples",
    "get_eval_dataloader",
    "get_total_train_batch_size",
    "log",
    "save_model",
    "train",
    "training_step",
}
OTHER_ARGUMENTS = {"__init__", "create_model_card", "push_to_hub"}  # as TRL's trainers have them

# Of the Trainer, and used without being overridden
USED = ("_get_collator_with_removed_columns", "_get_output_dir", "get_decay_parameter_names")


def overridden() -> set[str]:
    ours = ESTrainer.__mro__[: ESTrainer.__mro__.index(Trainer)]
    found = {name for cls in ours for name, value in vars(cls).items() if inspect.isfunction(value)}
    return {name for name in found if hasattr(Trainer, name)}


def test_what_is_overridden_is_what_is_meant_to_be():
    assert overridden() == PRIVATE | PUBLIC | OTHER_ARGUMENTS


@pytest.mark.parametrize("name", sorted(PRIVATE | PUBLIC))
def test_overridden_methods_take_the_same_arguments(name):
    ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (ESTrainer, Trainer))
    assert list(ours) == list(theirs)
    for parameter, other in zip(ours.values(), theirs.values(), strict=True):
        assert (parameter.kind, parameter.default) == (other.kind, other.default), parameter.name


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_the_trainer_calls_the_private_methods_that_are_overridden(name):
    assert f"self.{name}(" in inspect.getsource(trainer)


@pytest.mark.parametrize("name", USED)
def test_methods_that_are_used_exist(name):
    assert inspect.isfunction(getattr(Trainer, name))
