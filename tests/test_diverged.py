"""Runs whose weights, or what is computed with them, are not numbers any more."""

import pytest
from conftest import assert_same, letters, make_model, weights
from transformers import TrainerCallback

from es_trainer import replay


class Explode(TrainerCallback):
    """Makes the second update too large, once."""

    done = False

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        if state.global_step == 1 and not self.done:
            self.done = True
            for group in optimizer.param_groups:
                group["lr"] = 1e42


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"perturbation": "low_rank"}, {"master_weights": "none"}])
def test_a_diverged_update_is_named_and_nothing_of_it_is_written(trainer, model_folder, tmp_path, options):
    run = trainer(callbacks=[Explode()], save_strategy="steps", save_steps=1, **options)
    with pytest.raises(FloatingPointError) as raised:
        run.train()
    message = str(raised.value)
    assert message.startswith("Step 2: The update made weights of `model.embed_tokens.weight` NaN or infinite.")
    assert "Lower `learning_rate` (0.02) or `sigma` (0.05)" in message
    assert message.endswith(f"The last good checkpoint is {tmp_path / 'run' / 'checkpoint-1'}.")
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 1 + 1
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1"]
    with pytest.raises(FloatingPointError, match="cannot be saved"):
        run.save_model(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = trainer(max_steps=2, save_strategy="steps", **options)
    again.train(resume_from_checkpoint=True)
    assert all(values.isfinite().all() for values in weights(again.model).values())
    assert_same(weights(again.model), weights(replay(model_folder, tmp_path / "run")))


def test_a_run_can_go_on_from_the_good_checkpoint_in_the_same_trainer(trainer, tmp_path):
    run = trainer(callbacks=[Explode()], save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError):
        run.train()
    with pytest.raises(FloatingPointError, match="are NaN or infinite before training"):
        run.train()
    run.train(resume_from_checkpoint=True)
    run.save_model(tmp_path / "out")
    assert all(values.isfinite().all() for values in weights(run.model).values())


def test_working_weights_beyond_float16_are_found(trainer):
    with pytest.raises(FloatingPointError, match="Step 1: The update made weights of .*, or set bf16=True"):
        trainer(learning_rate=1e7, fp16=True).train()


@pytest.mark.parametrize(
    "options", [{}, {"perturbation": "low_rank"}, {"temperature": 1.0}, {"generation_kwargs": {"use_cache": False}}]
)
def test_members_without_logits_are_named(trainer, tmp_path, options):
    with pytest.raises(FloatingPointError, match=r"Step 1: The model's logits are not numbers.* `sigma` \(1e\+39\)"):
        trainer(sigma=1e39, **options).train()
    assert not (tmp_path / "run" / "history.jsonl").exists()


def test_a_model_with_nan_is_refused(trainer):
    model = make_model()
    model.model.norm.weight.data[3] = float("nan")
    run = trainer(model)
    with pytest.raises(FloatingPointError, match="Weights of `model.norm.weight` are NaN or infinite before training"):
        run.train()
    with pytest.raises(FloatingPointError, match="logits are not numbers"):
        run.evaluate()


def test_rewards_do_not_count_as_divergence(trainer):
    run = trainer(reward_funcs=lambda completions, **kwargs: [1e6 * reward for reward in letters(completions)])
    run.train()
    assert run.state.global_step == 3
