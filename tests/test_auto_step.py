"""Updates that are tried at several lengths."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same, history, letters, logs, make_model, weights
from datasets import Dataset

from es_trainer import replay
from es_trainer.evolution import EvolutionStrategy
from es_trainer.run.auto_step import AutoStep


def told(**options) -> tuple[torch.nn.Parameter, EvolutionStrategy]:
    parameter = torch.nn.Parameter(torch.zeros(50))
    optimizer = EvolutionStrategy([("weight", parameter)], lr=0.1, population_size=4, **options)
    optimizer.tell(optimizer.ask(), [1.0, 2.0, 3.0, 4.0])
    return parameter, optimizer


@pytest.mark.parametrize(
    ("best", "expected"), [(0.05, 1 / 16), (0.1, 0.125), (0.4, 0.5), (1.2, 1.0), (1.9, 2.0), (9.0, 2.0)]
)
def test_the_best_length_is_taken(best, expected):
    """Rewards fall off on both sides of `best` steps, equally on all prompts."""
    parameter, optimizer = told()
    with optimizer.previewed(1.0):
        step = parameter.detach().clone()

    def rewards() -> np.ndarray:
        length = float(parameter.detach() @ step / (step @ step))
        return np.array([0.1, 0.9]) - abs(length - best)

    metrics = AutoStep().choose(optimizer, rewards)
    assert optimizer.step_scale == expected
    assert metrics == pytest.approx(
        {
            "auto_step/reward": 0.5 - abs(1 - best),
            "auto_step/gain": best - abs(1 - best),
            "auto_step/gain_error": 0.0,
            "auto_step/half": abs(1 - best) - abs(0.5 - best),
            "auto_step/half_error": 0.0,
            "auto_step/double": abs(1 - best) - abs(2 - best),
            "auto_step/double_error": 0.0,
        },
        abs=1e-6,
    )
    assert not parameter.any()


def test_trials_are_added_up_until_they_are_certain():
    """
    One prompt gains 3 by a double step and the other loses 1: 1 on average, with a standard error of 2. After n trials
    that is n beside 2 sqrt(n), which is certain (1.645 standard errors) from n = 11 on: 11 > 1.645 * 2 * 3.317.
    """
    parameter, optimizer = told()
    with optimizer.previewed(1.0):
        step = parameter.detach().clone()
    tried = AutoStep()

    def rewards() -> np.ndarray:
        length = float(parameter.detach() @ step / (step @ step))
        return np.array([3.0, -1.0]) * (math.log2(length) if length > 0 else -9.0)

    lines = []
    for _ in range(10):
        lines.append({"metrics": tried.choose(optimizer, rewards), "step_scale": optimizer.step_scale})
        lines.append({"metrics": {}, "step_scale": optimizer.step_scale})  # of a step without a trial
        assert optimizer.step_scale == 1.0
    tried.choose(optimizer, rewards)
    assert optimizer.step_scale == 2.0
    tried.choose(optimizer, rewards)  # nothing is known of the new length
    assert optimizer.step_scale == 2.0

    optimizer.step_scale = 1.0
    resumed = AutoStep()
    resumed.repeat(lines)
    resumed.choose(optimizer, rewards)
    assert optimizer.step_scale == 2.0


def test_a_step_that_ends_all_rewards_is_halved_although_half_of_it_is_no_better():
    parameter, optimizer = told()
    with optimizer.previewed(1.0):
        step = parameter.detach().clone()
    for without in (0.0, math.nan):

        def rewards(without=without) -> np.ndarray:
            return np.array([1.0, 0.9]) if parameter.detach() @ step < 0.2 * step @ step else np.full(2, without)

        optimizer.step_scale = 1.0
        AutoStep().choose(optimizer, rewards)
        assert optimizer.step_scale == 0.125


@pytest.mark.parametrize("rewards", [[0.5, 0.5], [math.nan, math.nan], [1.0]])
def test_rewards_that_say_nothing_leave_it(rewards):
    _, optimizer = told()
    AutoStep().choose(optimizer, lambda: np.array(rewards))
    assert optimizer.step_scale == 1.0


def test_it_is_bounded():
    parameter, optimizer = told()
    tried = AutoStep()
    for _ in range(6):
        tried.choose(optimizer, lambda: np.array([1.0, 1.0]) * float(parameter.detach().norm()))
    assert optimizer.step_scale == 16.0
    AutoStep().choose(optimizer, lambda: -np.array([1.0, 1.0]) * float(parameter.detach().norm()))
    assert optimizer.step_scale == 1 / 16


OPTIONS = {"auto_step": 2, "auto_step_prompts": 2, "max_steps": 5, "learning_rate": 0.4}


def near(model) -> Callable[..., list[float]]:
    """Prefers letters, and weights that have not gone far: the latter by the same for all prompts."""
    first = model.model.layers[0].mlp.up_proj.weight

    def letters_and_near(completions, **kwargs):
        return [reward - float(first.detach().float().norm()) for reward in letters(completions)]

    return letters_and_near


@pytest.mark.parametrize("options", [{}, {"perturbation": "low_rank", "es_optimizer": "adam", "bf16": True}])
def test_the_history_replays_it_and_resuming_goes_on_with_it(trainer, tmp_path, options):
    options = OPTIONS | options
    model = make_model()
    whole = trainer(model, near(model), **options, save_strategy="steps", save_steps=3)
    whole.train()
    scales = [line["step_scale"] for line in history(whole.args.output_dir)]
    assert scales[0] == scales[1] and scales[2] == scales[3] < 1.0
    assert [log["step_scale"] for log in logs(whole)] == scales
    assert ["auto_step/reward" in log for log in logs(whole)] == [True, False, True, False, True]
    assert_same(weights(replay(make_model(), whole.args.output_dir)), weights(whole.model))

    model = make_model()
    resumed = trainer(model, near(model), **options, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
    assert [line["step_scale"] for line in history(resumed.args.output_dir)] == scales
    assert_same(weights(resumed.model), weights(whole.model))

    # From the history alone, no prompt is answered
    for checkpoint in Path(whole.args.output_dir).glob("checkpoint-*"):
        checkpoint.rename(tmp_path / checkpoint.name)

    def never(**kwargs):
        raise AssertionError("a reward was asked for")

    never.__name__ = "letters_and_near"
    again = trainer(make_model(), never, **options)
    again.train(resume_from_checkpoint=True)
    assert_same(weights(again.model), weights(whole.model))


def test_held_out_prompts_are_the_first_of_the_first_dataset(trainer):
    asked = []

    def reward(completions, prompts, **kwargs):
        asked.append(list(prompts))
        return [float(len(completion)) for completion in completions]

    task = Dataset.from_list([{"prompt": f"Held out {number}"} for number in range(9)])
    run = trainer(
        make_model(),
        reward,
        eval_dataset={"task": task, "other": Dataset.from_list([{"prompt": "Other"}])},
        **OPTIONS | {"max_steps": 1, "auto_step_prompts": 3, "per_device_eval_batch_size": 2},
    )
    run.train()
    assert asked[4:7] == [["Held out 0", "Held out 1", "Held out 2"]] * 3


def test_a_run_without_it_says_nothing_of_it(trainer):
    run = trainer(make_model())
    run.train()
    assert "step_scale" not in history(run.args.output_dir)[0] and "step_scale" not in logs(run)[0]


@pytest.mark.parametrize(
    "wrong",
    [{"auto_step": -1}, {"auto_step_prompts": 0}, {"master_weights": "none"}],
)
def test_what_cannot_be(config, wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong)) if 'master_weights' not in wrong else 'auto_step'}="):
        config(**OPTIONS | wrong)


def test_it_needs_held_out_prompts(trainer):
    with pytest.raises(ValueError, match="`auto_step=2` is not valid: .*`eval_dataset`"):
        trainer("no/model", eval_dataset=None, **OPTIONS)
