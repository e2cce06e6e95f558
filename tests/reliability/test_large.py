"""Runs that are larger than what they were written for."""

import pytest
import torch
from conftest import history, make_model, weights
from datasets import Dataset

from es_trainer import replay


def moved(run) -> bool:
    return not torch.equal(weights(run.model)["model.norm.weight"], weights(make_model())["model.norm.weight"])


@pytest.mark.slow
def test_ten_thousand_prompts_in_a_step(trainer, tmp_path, model_folder):
    data = Dataset.from_dict({"prompt": [f"Say {number}" for number in range(10_000)]})
    options = {"num_prompts_per_step": 10_000, "per_device_train_batch_size": None, "population_size": 2}
    run = trainer(
        train_dataset=data, eval_dataset=None, max_steps=1, max_completion_length=2, log_completions=True, **options
    )
    run.train()
    assert moved(run)
    (line,) = history(tmp_path / "run")
    assert len(str(line)) < 10_000  # a line has nothing of each prompt
    replayed = dict(replay(model_folder, tmp_path / "run").named_parameters())
    assert all(torch.equal(replayed[name], values) for name, values in weights(run.model).items())


@pytest.mark.slow
@pytest.mark.parametrize("perturbation", ["gaussian", "low_rank"])
def test_four_thousand_members(trainer, tmp_path, model_folder, perturbation):
    options = {"population_size": 4096, "num_prompts_per_step": 1, "per_device_train_batch_size": None}
    run = trainer(perturbation=perturbation, max_steps=1, max_completion_length=1, eval_dataset=None, **options)
    run.train()
    assert moved(run)
    (line,) = history(tmp_path / "run")
    assert len(line["utilities"]) == len(line["rewards"]) == 4096
    replayed = dict(replay(model_folder, tmp_path / "run").named_parameters())
    assert all(torch.equal(replayed[name], values) for name, values in weights(run.model).items())


LONG = 100_000  # tokens, of which each is a character


@pytest.mark.slow
def test_a_prompt_of_a_hundred_thousand_tokens(trainer):
    model = make_model(
        max_position_embeddings=2 * LONG,
        num_hidden_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    data = Dataset.from_dict({"prompt": ["x" * LONG]})
    options = {"population_size": 2, "num_prompts_per_step": 1, "per_device_train_batch_size": None}
    run = trainer(model, train_dataset=data, eval_dataset=None, max_steps=1, max_completion_length=2, **options)
    run.train()
    (log,) = [log for log in run.state.log_history if "reward" in log]
    assert log["num_tokens"] >= 2 * LONG


def test_a_prompt_that_the_model_cannot_read_is_refused(trainer):
    data = Dataset.from_dict({"prompt": ["x", "x" * LONG, "x" * 300]})
    with pytest.raises(ValueError, match=r"2 of the prompts|Prompt 1 has 100000 tokens"):
        trainer(train_dataset=data)
