"""Training on a GPU: `make gpu`."""

import gc

import pytest
import torch
from conftest import assert_same, make_model, weights

from es_trainer import replay
from es_trainer.evolution import EvolutionStrategy


GPU = {"use_cpu": False}
KINDS = [{"perturbation": "gaussian"}, {"perturbation": "low_rank"}]
RUNS = [*KINDS, {"perturbation": "gaussian", "es_optimizer": "adam", "antithetic": True, "anchor_decay": 0.1}]


def train(trainer, **options) -> dict[str, torch.Tensor]:
    run = trainer(make_model(), **GPU, **options)
    run.train()
    assert all(parameter.device.type == "cuda" for parameter in run.model.parameters())
    return {name: weight.cpu() for name, weight in weights(run.model).items()}


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_weights_are_those_of_the_cpu(trainer, options):
    found = train(trainer, **options)
    run = trainer(make_model(), use_cpu=True, **options)
    run.train()
    expected = weights(run.model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("options", RUNS, ids=str)
def test_a_run_has_the_same_bits_again(trainer, options, bf16):
    assert_same(train(trainer, bf16=bf16, **options), train(trainer, bf16=bf16, **options))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_resume_has_the_same_bits(trainer, options, tmp_path):
    whole = train(trainer, bf16=True, max_steps=4, **options)
    cut = {"output_dir": str(tmp_path / "cut"), "save_strategy": "steps", "save_steps": 2, "bf16": True, **options}
    trainer(make_model(), **GPU, **{**cut, "max_steps": 2}).train()
    run = trainer(make_model(), **GPU, **{**cut, "max_steps": 4})
    run.train(resume_from_checkpoint=True)
    assert_same({name: weight.cpu() for name, weight in weights(run.model).items()}, whole)


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_a_replay_has_the_same_bits(trainer, model_folder, tmp_path, options):
    run = trainer(**GPU, bf16=True, **options)
    run.train()
    assert_same(weights(replay(model_folder, tmp_path / "run")), weights(run.model))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_masters_in_host_memory_have_the_same_bits(trainer, options):
    host = train(trainer, bf16=True, master_weights="host", **options)
    assert_same(host, train(trainer, bf16=True, master_weights="device", **options))
    gc.collect()  # unlocks the memory


@pytest.mark.parametrize("anchor_weights", ["host", "model"])
def test_initial_weights_elsewhere_have_the_same_bits(trainer, model_folder, anchor_weights):
    options = {"bf16": True, "anchor_decay": 5.0, **GPU}
    runs = [trainer(model_folder, anchor_weights=place, **options) for place in (anchor_weights, "device")]
    for run in runs:
        run.train()
    assert_same(*(weights(run.model) for run in runs))
    del runs, run
    gc.collect()  # unlocks the memory


def test_perturb_and_restore():
    model = make_model().cuda()
    optimizer = EvolutionStrategy(list(model.named_parameters()), dtype=torch.bfloat16)
    before = weights(model)
    for member in optimizer.ask():
        optimizer.perturb(member)
        assert any(not torch.equal(before[name], weight) for name, weight in weights(model).items())
    optimizer.restore()
    assert_same(weights(model), before)


def test_a_checksum_is_that_of_the_cpu():
    model = make_model()
    expected = EvolutionStrategy(list(model.named_parameters())).weights.checksums()
    assert EvolutionStrategy(list(model.cuda().named_parameters())).weights.checksums() == expected
