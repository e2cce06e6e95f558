"""`optimizers` and `callbacks`, as GRPOTrainer documents them."""

import json

import pytest
import torch
from conftest import assert_same, logs, weights
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, SequentialLR
from transformers import TrainerCallback
from trl import LogCompletionsCallback, RichProgressCallback


def other_optimizer() -> SGD:
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.08)


SCHEDULERS = {
    "lambda": lambda: LambdaLR(other_optimizer(), lambda step: 1 / (1 + step)),
    "exponential": lambda: ExponentialLR(other_optimizer(), gamma=0.5),
    "sequential": lambda: (
        lambda optimizer: SequentialLR(
            optimizer, [ExponentialLR(optimizer, 0.5), CosineAnnealingLR(optimizer, 4)], milestones=[2]
        )
    )(other_optimizer()),
}


def history(folder) -> list[float]:
    _, *lines = map(json.loads, (folder / "run" / "history.jsonl").read_text().splitlines())
    return [line["learning_rate"] for line in lines]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_ones_own_sets_the_learning_rate(trainer, tmp_path, name, recwarn):
    scheduler, expected = SCHEDULERS[name](), []
    for _ in range(4):
        expected.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    run = trainer(optimizers=(None, SCHEDULERS[name]()), max_steps=4)
    run.train()
    assert history(tmp_path) == pytest.approx(expected)
    assert len(set(expected)) > 2
    assert [log["learning_rate"] for log in logs(run)] == pytest.approx(expected)
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_goes_on_after_resuming(trainer, tmp_path, name):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = trainer(optimizers=(None, SCHEDULERS[name]()), **options)
    straight.train()
    expected = history(tmp_path)
    resumed = trainer(optimizers=(None, SCHEDULERS[name]()), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert history(tmp_path) == expected
    assert_same(weights(resumed.model), weights(straight.model))


def test_an_optimizer_is_refused(trainer):
    with pytest.raises(ValueError, match=r"optimizers=\(SGD, \.\.\.\).*`es_optimizer`.*\(None, scheduler\)"):
        trainer(model="no/such-model", optimizers=(other_optimizer(), None))
    with pytest.raises(TypeError, match="`optimizers` has a SGD for a scheduler"):
        trainer(model="no/such-model", optimizers=(None, other_optimizer()))


def test_callbacks_of_trl(trainer, capsys, monkeypatch, tmp_path):
    """Those that GRPO's users add, and what they need of trainer, state and arguments."""
    import wandb

    tables = []
    monkeypatch.setattr(wandb, "log", tables.append)  # what is tested is the callback's use of the trainer
    run = trainer(
        callbacks=[RichProgressCallback()], eval_strategy="steps", eval_steps=1, max_steps=2, report_to="none"
    )
    run.args.report_to = ["wandb"]
    run.add_callback(LogCompletionsCallback(run, num_prompts=2, freq=1))
    run.train()
    assert "Training" in capsys.readouterr().out
    assert [len(table["completions"]) for table in tables] == [2, 4]
    assert (tmp_path / "run" / "history.jsonl").is_file()


def test_callbacks_see_the_unperturbed_weights(trainer):
    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            assert all(torch.equal(shard.working, shard.master) for shard in optimizer.weights.shards)
            seen.append(state.global_step)

    seen = []
    trainer(callbacks=[Watch()]).train()
    assert seen == [1, 2, 3]
