"""The method in one file and the trainer make the same weights."""

import importlib.util
from pathlib import Path

import pytest
from conftest import assert_same, make_model, make_tokenizer, weights
from datasets import Dataset


def load_nano_es():
    path = Path(__file__).parents[1] / "examples" / "nano_es.py"
    spec = importlib.util.spec_from_file_location("nano_es", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def capitals(completions: list[str], **kwargs) -> list[float]:
    return [float(sum(map(ord, text)) % 101) for text in completions]


@pytest.mark.parametrize("seed", [42, 7])
def test_three_steps_have_the_same_bits(trainer, seed):
    prompts = ["Say one", "Say three", "two"]
    options = {"population_size": 6, "sigma": 0.05, "learning_rate": 0.02}

    model = make_model()
    before = weights(model)
    load_nano_es().train(model, make_tokenizer(), prompts, capitals, 3, max_new_tokens=8, seed=seed, **options)
    assert any((before[name] != weight).any() for name, weight in weights(model).items())

    run = trainer(
        make_model(),
        reward_funcs=capitals,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        num_prompts_per_step=len(prompts),
        seed=seed,
        max_completion_length=8,
        max_steps=3,
        **options,
    )
    run.train()
    assert_same(weights(run.model), weights(model))
