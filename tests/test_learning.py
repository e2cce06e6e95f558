"""What a run logs about whether it learns."""

import itertools
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same, letters, logs, weights
from datasets import Dataset
from transformers import TrainerCallback

from es_trainer.evolution.optimizer import UpdateRecord
from es_trainer.evolution.signal import signal
from es_trainer.run.learning import WINDOW, Learning


KINDS = [
    {},
    {"perturbation": "low_rank"},
    {"perturbation": "low_rank", "population_batch_size": 2},
    {"bf16": True, "master_weights": "none"},
    {"bf16": True, "antithetic": True, "population_batch_size": 2},
]


class Substeps(TrainerCallback):
    count = 0

    def on_substep_end(self, *args, **kwargs):
        self.count += 1


@pytest.mark.parametrize("options", KINDS)
def test_the_center_is_what_the_weights_are_rewarded_and_changes_nothing(trainer, options):
    plain = trainer(**options)
    plain.train()
    substeps = Substeps()
    run = trainer(callbacks=[substeps], evaluate_center=True, **options)
    before = []

    def evaluate(*_):
        with run.backend.in_working_dtype():
            before.append(run.evaluate(Dataset.from_list(rows[-1]))["eval_reward"])

    rows = []
    step = run.training_step
    run.training_step = lambda model, inputs, *rest: rows.append(inputs) or evaluate() or step(model, inputs, *rest)
    run.train()
    assert_same(weights(run.model), weights(plain.model))
    assert substeps.count == 3 * 4
    of_steps = logs(run)
    if options.get("master_weights") != "none":  # there, members leave rounding errors behind
        assert [log["reward/center"] for log in of_steps] == pytest.approx(before)
        assert of_steps[2]["gain"] == pytest.approx(before[2] - before[1])
    for log, there in zip(of_steps, logs(plain), strict=True):
        assert log["sigma_cost"] == pytest.approx(log["reward/center"] - log["reward"])
        same = ("reward", "reward_std", "completions/mean_length", "signal", "rewards/letters/mean")
        assert [log[key] for key in same] == [there[key] for key in same]
        assert log["num_tokens"] > there["num_tokens"]
    assert "gain" not in of_steps[0]


def test_reward_functions_see_the_center_as_one_more_member(trainer):
    sizes = []

    def counted(completions, **kwargs):
        sizes.append(len(completions))
        return letters(completions)

    run = trainer(reward_funcs=counted, evaluate_center=True, max_steps=1)
    run.train()
    assert sizes == [2] * 5


def test_the_signal_is_that_of_the_members_and_prompts(trainer):
    rewards = []

    def spy(completions, **kwargs):
        rewards.append(letters(completions))
        return rewards[-1]

    run = trainer(reward_funcs=spy, max_steps=1, num_prompts_per_step=3)
    run.train()
    (log,) = logs(run)
    assert (log["signal"], log["signal_low"], log["signal_high"]) == pytest.approx(signal(np.array(rewards)))
    assert log["signal_low"] < log["signal"] < log["signal_high"]
    step_length = run.args.learning_rate / run.args.sigma
    # Z-scores are fitness above the mean, divided by its deviation
    assert log["expected_gain"] == pytest.approx(step_length * log["signal"] * log["reward_std"])
    assert log["frac_reward_zero_std"] == np.mean(np.ptp(np.array(rewards), axis=0) == 0)


def test_of_one_prompt_and_of_adam_less_is_known(trainer):
    run = trainer(max_steps=1, num_prompts_per_step=1)
    run.train()
    assert not {"signal", "expected_gain"} & logs(run)[0].keys()
    run = trainer(max_steps=1, es_optimizer="adam")
    run.train()
    assert "signal" in logs(run)[0] and "expected_gain" not in logs(run)[0]


def test_a_random_walk_is_as_long_as_the_updates_together(trainer):
    run = trainer(max_steps=3)
    run.train()
    norms = [log["update_norm"] for log in logs(run)]
    assert [log["random_walk_distance"] for log in logs(run)] == pytest.approx(
        [np.linalg.norm(norms[:i]) for i in (1, 2, 3)]
    )
    run.train()  # it goes on
    norms += [log["update_norm"] for log in logs(run)]
    assert logs(run)[-1]["random_walk_distance"] == pytest.approx(np.linalg.norm(norms))


def test_updates_are_measured_in_norms_of_the_weights(trainer):
    run = trainer(max_steps=1)
    run.train()
    (log,) = logs(run)
    norm = np.sqrt(sum(float(p.detach().double().square().sum()) for p in run.model.parameters()))
    assert log["relative_update_norm"] == pytest.approx(log["update_norm"] / norm, rel=1e-3)


REUSED = {"num_steps_per_population": 3, "max_steps": 5, "save_strategy": "steps", "save_steps": 2}


def cosines(run) -> list[float | None]:
    return [log.get("update_cosine") for log in logs(run)]


@pytest.mark.parametrize("options", [{}, {"antithetic": True, "es_optimizer": "adam"}])
def test_updates_of_a_reused_population_are_compared(trainer, options):
    run = trainer(**REUSED | options)
    run.train()
    _, *lines = map(json.loads, (Path(run.args.output_dir) / "history.jsonl").read_text().splitlines())
    halves = 2 if options else 1
    noises = [
        (np.array(line["utilities"]) * line["signs"]).reshape(-1, halves).sum(axis=1)  # a pair is one noise
        for line in lines
    ]
    expected = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.pairwise(noises)]
    # The fourth step has another population
    assert cosines(run) == [
        None,
        pytest.approx(expected[0]),
        pytest.approx(expected[1]),
        None,
        pytest.approx(expected[3]),
    ]


def test_updates_of_fresh_populations_are_not(trainer):
    run = trainer()
    run.train()
    assert cosines(run) == [None] * 3


@pytest.mark.parametrize("checkpoint", [2, 4])
@pytest.mark.parametrize("from_history", [False, True])
def test_a_resumed_run_compares_the_same_updates(trainer, tmp_path, checkpoint, from_history):
    whole = trainer(**REUSED)
    whole.train()
    output = tmp_path / "resumed"
    shutil.copytree(Path(whole.args.output_dir) / f"checkpoint-{checkpoint}", output / f"checkpoint-{checkpoint}")
    if from_history:
        shutil.copy(Path(whole.args.output_dir) / "history.jsonl", output)
    resumed = trainer(**REUSED | {"output_dir": str(output)})
    resumed.train(resume_from_checkpoint=True)
    assert cosines(resumed) == cosines(whole)


def test_a_further_call_goes_on_comparing_unless_weights_went_back(trainer):
    run = trainer(**REUSED | {"max_steps": 1})
    run.train()
    run.train()  # the second step of the population
    assert cosines(run)[-1] is not None
    line = {"seeds": [1], "signs": [1], "utilities": [2.0], "metrics": {"update_norm": 1.0}}
    for updates, expected in ((2, {"update_cosine": 1.0}), (1, {})):  # of two; the first step's update is not at hand
        learning = Learning()
        learning.resume([line, line])
        learning.go_back(updates)
        run.optimizer.update_record = UpdateRecord([1], [1], [1.0])
        assert learning.updating(run.optimizer) == expected


def test_a_resumed_run_says_the_same(trainer, tmp_path):
    options = {"evaluate_center": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer(**options)
    whole.train()
    resumed = trainer(**options | {"output_dir": str(tmp_path / "resumed")})
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    keys = ("signal", "reward/center", "gain", "sigma_cost", "expected_gain", "random_walk_distance")
    mine, theirs = ([[log[key] for key in keys] for log in logs(run)[2:]] for run in (resumed, whole))
    assert mine == theirs


def test_a_checkpoint_of_a_version_without_these_settings_goes_on(trainer):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer(**options)
    whole.train()
    checkpoint = Path(whole.args.output_dir) / "checkpoint-2"
    for path in (checkpoint / "history.jsonl", Path(whole.args.output_dir) / "history.jsonl"):
        header, *lines = path.read_text().splitlines()
        header = json.loads(header)
        del header["config"]["generation_reward"], header["config"]["multi_objective_aggregation"]
        path.write_text("\n".join([json.dumps(header), *lines]) + "\n")
    (checkpoint / "checksums.json").unlink()  # which those versions did not write either
    resumed = trainer(**options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(resumed.model), weights(whole.model))


def test_a_weak_signal_is_said_once(caplog):
    learning = Learning()
    with caplog.at_level(logging.WARNING, logger="es_trainer.run.learning"):
        for step in range(1, 2 * WINDOW):
            assert (len(caplog.records) > 0) == (step > WINDOW)
            learning.done({"signal": 0.05, "update_norm": 1.0}, step)
    (said,) = caplog.records
    assert said.message.startswith(f"Step {WINDOW}: signal 0.05 over the last {WINDOW} steps.")


def test_a_good_signal_is_not_warned_of(caplog):
    learning = Learning()
    for step in range(1, 2 * WINDOW):
        learning.done({"signal": 0.3, "update_norm": 1.0}, step)
    assert not caplog.records
