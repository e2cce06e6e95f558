"""What makes saving fail is found when the trainer is made."""

import os

import pytest
import torch
from conftest import assert_same, letters, make_model, weights
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM


@pytest.mark.parametrize("setting", [{"temperature": 0.7}, {"top_p": 0.8, "top_k": 5}, {"min_p": 0.1}])
def test_sampling_without_do_sample_is_left_out(trainer, tmp_path, caplog, setting):
    model = make_model()
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    run = trainer(model, save_strategy="steps", save_steps=1)
    for name, value in setting.items():
        assert f"{name}={value}" in caplog.text
    run.train()
    run.save_model(tmp_path / "out")
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert not saved.do_sample and all(getattr(saved, name) is None for name in setting)


def test_sampling_with_do_sample_is_kept(trainer, tmp_path):
    model = make_model()
    model.generation_config.update(do_sample=True, temperature=0.7)
    run = trainer(model)
    run.save_model(tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.7


def test_a_generation_config_that_cannot_be_saved_is_refused(trainer):
    model = make_model()
    model.generation_config.num_return_sequences = 3
    with pytest.raises(ValueError, match="`model.generation_config` cannot be saved with .*num_return_sequences"):
        trainer(model)


def test_one_parameter_with_two_names_that_the_model_does_not_tie_is_refused(trainer):
    model = make_model(tie=False)
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    with pytest.raises(ValueError, match="weights cannot be saved: .*gate_proj"):
        trainer(model)


def test_parameters_that_are_views_of_the_same_weights_are_refused(trainer):
    model = make_model()
    whole = torch.randn(96, 32)
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = whole[:64], whole[32:]
    with pytest.raises(ValueError, match="weights cannot be saved: .*(gate_proj.*up_proj|up_proj.*gate_proj)"):
        trainer(model)


def test_neighbours_in_one_storage_and_tied_embeddings_are_saved(trainer, tmp_path):
    model = make_model()
    whole = torch.randn(128, 32) / 8
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = whole[:64], whole[64:]
    run = trainer(model)
    run.train()
    run.save_model(tmp_path / "out")
    assert_same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), weights(run.model))


def test_a_class_that_ties_by_itself_is_saved(trainer, tmp_path):
    run = trainer(LlamaForCausalLM(make_model().config))
    run.save_model(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_files_are_where_the_run_began(trainer, tmp_path, monkeypatch):
    for folder in ("start", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "start")

    def moves(completions, **kwargs):
        os.chdir(tmp_path / "elsewhere")
        return letters(completions)

    options = {"save_strategy": "steps", "save_steps": 1, "log_completions": True, "logging_steps": 1}
    run = trainer(reward_funcs=moves, output_dir="run", eval_strategy="steps", eval_steps=1, **options)
    assert run.args.output_dir == str(tmp_path / "start" / "run")
    run.train()
    run.save_model()
    assert len((tmp_path / "start" / "run" / "history.jsonl").read_text().splitlines()) == 1 + 3
    assert (tmp_path / "start" / "run" / "model.safetensors").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())
