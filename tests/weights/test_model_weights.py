"""What the optimizer perturbs is what the model computes with, and what users find in the model."""

import pytest
import torch
from conftest import assert_same, make_model, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from es_trainer.evolution import EvolutionStrategy, Member
from es_trainer.noise import noise


BF16 = {"bf16": True}


# ---- the model outside of training ----


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master_weights", ["device", "host", "none"])
def test_the_model_saves_what_the_trainer_saves(trainer, tmp_path, given, master_weights):
    run = trainer(make_model(dtype=given), master_weights=master_weights, **BF16)
    assert {parameter.dtype for parameter in run.model.parameters()} == {given}
    run.train()
    run.save_model(tmp_path / "trainer")
    run.model.save_pretrained(tmp_path / "model")
    theirs = load_file(tmp_path / "trainer" / "model.safetensors")
    assert_same(load_file(tmp_path / "model" / "model.safetensors"), theirs)
    for shard in run.optimizer.weights.shards:
        assert theirs[shard.name].dtype == given
        assert torch.equal(theirs[shard.name].flatten(), shard.trained.to(given))


def test_an_update_that_bfloat16_cannot_show_is_seen_in_the_model(trainer):
    run = trainer(learning_rate=1e-6, **BF16)
    before = weights(run.model)
    run.train()
    for name, values in weights(run.model).items():
        assert 0 < (values - before[name]).abs().max() < 1e-4, name


def test_training_and_evaluation_use_the_working_dtype(trainer):
    seen = []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append(model.dtype)

        def on_prediction_step(self, args, state, control, model, **kwargs):
            seen.append(model.dtype)

    run = trainer(make_model(), callbacks=[Note()], max_steps=1, **BF16)
    run.train()
    run.evaluate()
    assert set(seen) == {torch.bfloat16} and len(seen) == 2
    assert run.model.dtype == torch.float32


@pytest.mark.parametrize("master_weights", ["device", "host", "none"])
def test_looking_at_the_model_between_does_not_change_a_run(trainer, master_weights):
    options = {"master_weights": master_weights, "es_optimizer": "adam", **BF16}
    mine, theirs = trainer(make_model(), **options), trainer(make_model(), **options)
    for run in (mine, theirs):
        run.train()
    mine.evaluate()
    mine.model.state_dict()
    for run in (mine, theirs):
        run.train()
    assert_same(weights(mine.model), weights(theirs.model))


def test_frozen_parameters_are_as_they_were_given(trainer):
    model = make_model()
    model.model.embed_tokens.weight.requires_grad = False
    before = weights(model)["model.embed_tokens.weight"]
    run = trainer(model, max_steps=1, **BF16)
    run.train()
    run.evaluate()
    assert torch.equal(run.model.model.embed_tokens.weight, before)


def test_an_interrupted_run_leaves_its_weights_in_the_model(trainer):
    def interrupted(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            raise KeyboardInterrupt
        return [float(len(completion)) + i for i, completion in enumerate(completions)]

    run = trainer(make_model(), interrupted, **BF16)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    for shard in run.optimizer.weights.shards:
        assert torch.equal(shard.parameter.data.flatten(), shard.master), shard.name


# ---- weights that users set ----


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master_weights", ["device", "none"])
def test_weights_that_are_set_before_training_are_trained(trainer, given, master_weights):
    options = {"master_weights": master_weights, **BF16}
    expected = trainer(make_model(1, dtype=given), **options)
    expected.train()
    run = trainer(make_model(0, dtype=given), **options)
    run.model.load_state_dict(make_model(1, dtype=given).state_dict())
    run.train()
    assert_same(weights(run.model), weights(expected.model))


@pytest.mark.parametrize("change", [lambda model: model.half().float(), lambda model: model.to(torch.float64)])
def test_a_model_that_was_cast_before_training_is_trained_with_those_weights(trainer, change):
    run = trainer(make_model(), learning_rate=0.0, **BF16)
    expected = {name: values.float() for name, values in weights(change(make_model())).items()}
    change(run.model)
    run.train()
    assert_same(weights(run.model), expected)


# ---- what would leave the model untrained ----


def test_another_model_is_refused(trainer):
    run = trainer()
    run.model = make_model()
    with pytest.raises(RuntimeError, match="another parameter `model.embed_tokens.weight` than when the trainer"):
        run.train()


def test_resized_embeddings_are_refused(trainer):
    run = trainer()
    run.model.resize_token_embeddings(270)
    with pytest.raises(RuntimeError, match=r"`model.embed_tokens.weight` .*resize_token_embeddings"):
        run.train()


@pytest.mark.parametrize("change", [lambda model: model.double(), lambda model: model.model.norm.double()])
def test_a_model_that_is_cast_during_training_is_refused(trainer, change):
    class Cast(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            change(model)

    with pytest.raises(RuntimeError, match="was moved, cast or replaced while the trainer works with it"):
        trainer(callbacks=[Cast()]).train()


def test_a_model_that_is_patched_after_the_population_batch_was_checked_is_refused(trainer):
    run = trainer(perturbation="low_rank")
    mlp = run.model.model.layers[0].mlp
    mlp.forward = lambda x: x
    with pytest.raises(RuntimeError, match="compute in another way than when the trainer was made"):
        run.train()


# ---- with a member in the weights ----


@pytest.mark.parametrize("master_weights", ["device", "none"])
def test_callbacks_see_the_unperturbed_weights_between_members(trainer, tmp_path, master_weights):
    options = {"master_weights": master_weights, "learning_rate": 0.0, "max_steps": 1, "population_batch_size": 1}
    plain = trainer(make_model(), **options)
    reward = plain.evaluate()["eval_reward"]
    seen = []

    class Look(TrainerCallback):
        def on_substep_end(self, args, state, control, model, **kwargs):
            seen.append(run.evaluate()["eval_reward"])
            run.save_model(tmp_path / "between")

    run = trainer(make_model(), callbacks=[Look()], **options)
    run.train()
    assert seen == [reward] * 4
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "between")
    for name, values in weights(make_model()).items():
        assert torch.allclose(saved.get_parameter(name), values, atol=1e-5), name  # sigma is 0.05
    plain.train()
    assert [log["reward"] for log in run.state.log_history if "reward" in log] == [
        log["reward"] for log in plain.state.log_history if "reward" in log
    ]


def strategy(master_weights: str) -> EvolutionStrategy:
    return EvolutionStrategy(
        make_model().named_parameters(), sigma=0.1, population_size=4, master_weights=master_weights
    )


@pytest.mark.parametrize("master_weights", ["device", "none"])
def test_weights_are_saved_and_loaded_without_the_member_that_is_in_them(master_weights):
    mine, theirs = strategy(master_weights), strategy(master_weights)
    state = {name: values.clone() for name, values in make_model(1).named_parameters()}
    mine.perturb(mine.ask().members[0])
    with mine.weights.in_checkpoint_dtype():
        for shard in mine.weights.shards:
            assert torch.allclose(shard.parameter.data.flatten(), shard.trained, atol=1e-6)
            shard.parameter.data.copy_(state[shard.name])
        mine.weights.adopt()
    mine.restore()
    for shard in mine.weights.shards:
        assert torch.equal(shard.working, state[shard.name].flatten()), shard.name
    mine.perturb(mine.ask().members[0])
    mine.load_state_dict(theirs.state_dict())
    mine.restore()
    for shard, other in zip(mine.weights.shards, theirs.weights.shards, strict=True):
        assert torch.equal(shard.working, other.working)


@pytest.mark.parametrize("restoring", [False, True])
def test_in_place_noise_that_was_interrupted_is_taken_out_again(monkeypatch, restoring):
    es = strategy("none")
    before = [shard.working.clone() for shard in es.weights.shards]
    add, calls = noise.add, 0

    def interrupted(source, target, *args):
        nonlocal calls
        calls += 1
        if calls == 7:
            half = target.numel() // 2
            add(source[:half], target[:half], *args)
            raise KeyboardInterrupt
        add(source, target, *args)

    monkeypatch.setattr(noise, "CUDA_PIECE", 1000)  # several pieces for each parameter
    if restoring:
        es.perturb(Member(5, 1))
    monkeypatch.setattr(noise, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        es.restore() if restoring else es.perturb(Member(5, 1))
    es.restore()
    for shard, values in zip(es.weights.shards, before, strict=True):
        assert torch.allclose(shard.working, values, atol=1e-6), shard.name
