"""Memory that runs out while completions are generated."""

import pytest
import torch
from conftest import assert_same, make_model, weights
from transformers import LlamaForCausalLM


ROWS = 4  # that fit into memory at once


def hungry(most_rows: int = ROWS) -> LlamaForCausalLM:
    """A model for which torch finds no memory where it gets too many rows."""
    model = make_model()

    def use_memory(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > most_rows:
            torch.empty(2**62, dtype=torch.int8)

    model.register_forward_pre_hook(use_memory, with_kwargs=True)
    return model


OPTIONS = {"per_device_train_batch_size": 4, "num_generations": 2, "temperature": 1.0, "max_steps": 2}
KINDS = [
    {},
    {"perturbation": "low_rank", "population_batch_size": 4},
    pytest.param({"population_batch_size": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", KINDS)
def test_fewer_rows_are_generated_at_once_and_the_result_is_the_same(trainer, caplog, options):
    plain = trainer(make_model(), **OPTIONS, **options)
    plain.train()
    run = trainer(hungry(), **OPTIONS, **options)
    caplog.clear()
    run.train()
    assert_same(weights(run.model), weights(plain.model))
    said = [record.message for record in caplog.records if "Memory ran out" in record.message]
    assert len(said) == 1 and "generation_batch_size" in said[0]
    assert run.engine._most_rows <= ROWS


def test_a_single_row_that_does_not_fit_ends_the_run(trainer):
    run = trainer(hungry(0))
    before = weights(run.model)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        run.train()
    assert_same(weights(run.model), before)
