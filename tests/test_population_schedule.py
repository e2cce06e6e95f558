"""Runs whose population, or whose number of prompts, grows or shrinks."""

import dataclasses

import pytest
from conftest import assert_replays_and_resumes, history, letters, logs, make_model
from transformers import TrainerCallback

from es_trainer import ESConfig
from es_trainer.report.progress import MemberProgressCallback
from es_trainer.report.runs import Run
from es_trainer.scripts.arguments import Parser


GROWS = {"population_size": 2, "population_size_schedule": {1: 6, 3: 4}, "max_steps": 4}
SIZES = [2, 6, 6, 4]
KINDS = [
    {"antithetic": True},
    {"perturbation": "low_rank", "num_steps_per_population": 2},
    {"perturbation": "low_rank", "population_batch_size": 3},
    {"bf16": True, "master_weights": "none", "es_optimizer": "adam"},
]


class Substeps(TrainerCallback):
    def __init__(self):
        self.counts: list[int] = []

    def on_step_begin(self, *args, **kwargs):
        self.counts.append(0)

    def on_substep_end(self, *args, **kwargs):
        self.counts[-1] += 1


@pytest.mark.parametrize("options", KINDS)
def test_steps_have_the_members_that_it_says_and_replay_and_resume_exactly(trainer, tmp_path, options):
    options = GROWS | options | {"evaluate_center": True, "save_strategy": "steps", "save_steps": 2}
    substeps = Substeps()
    whole = trainer(make_model(), callbacks=[substeps], **options)
    whole.train()
    assert [len(line["seeds"]) for line in history(whole.args.output_dir)] == SIZES
    assert [len(line["rewards"]) for line in history(whole.args.output_dir)] == SIZES
    assert substeps.counts == SIZES
    resumed = assert_replays_and_resumes(trainer, whole, tmp_path, **options)
    assert [log["reward"] for log in logs(resumed)] == [log["reward"] for log in logs(whole)]


def test_a_run_is_resumed_with_the_same_schedule_only(trainer):
    options = GROWS | {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(**options).train()
    trainer(**options | {"max_steps": 3}).train(resume_from_checkpoint=True)
    other = trainer(**options | {"population_size_schedule": {1: 6}})
    with pytest.raises(ValueError, match="`population_size_schedule` is {'1': 6} but was {'1': 6, '3': 4}"):
        other.train(resume_from_checkpoint=True)


def test_what_a_person_sees_follows_it(trainer, capfd):
    run = trainer(**GROWS, disable_tqdm=False)
    totals = []

    class Totals(TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            (bar,) = (c.bar for c in run.callback_handler.callbacks if isinstance(c, MemberProgressCallback))
            totals.append(bar.total)

    run.add_callback(Totals)
    run.train()
    assert totals == [2] * 2 + [6] * 12 + [4] * 4
    said = "4 steps of 2 members, 6 from step 2 on, 4 from step 4 on x 2 prompts: up to 96 new tokens a step."
    assert said in capfd.readouterr().out
    completions = Run.read(run.args.output_dir).spent("completions")
    assert [completions(step) for step in range(5)] == [0, 4, 16, 28, 36]


@pytest.mark.parametrize("options", [{}, {"perturbation": "low_rank"}, {"shuffle_dataset": False}])
def test_steps_have_the_prompts_that_it_says_and_replay_and_resume_exactly(trainer, tmp_path, options):
    options = options | {"population_size": 2, "num_prompts_per_step": 1, "max_steps": 5, "evaluate_center": False}
    options |= {"num_prompts_per_step_schedule": {1: 3, 3: 2}, "save_strategy": "steps", "save_steps": 2}
    asked = []

    def reward(prompts, completions, **kwargs):
        asked.append(list(prompts))
        return letters(completions)

    whole = trainer(make_model(), reward, **options)
    whole.train()
    assert [len(prompts) for prompts in asked] == [1, 1, 3, 3, 3, 3, 2, 2, 2, 2]
    assert asked[::2] == asked[1::2]
    if options.get("shuffle_dataset") is False:  # six rows, three for each step
        words = "one two three four five six".split()
        of_steps = [words[:1], words[3:], words[:3], words[3:5], words[:2]]
        assert asked[::2] == [[f"Say {word}" for word in of_step] for of_step in of_steps]
    assert_replays_and_resumes(trainer, whole, tmp_path, reward, **options)
    assert asked[10:] == asked[4:10]


def test_what_a_person_sees_follows_both(trainer, capfd):
    run = trainer(**GROWS, num_prompts_per_step_schedule={2: 1})
    run.train()
    said = "6 from step 2 on, 4 from step 4 on x 2 prompts, 1 from step 3 on: up to 96 new tokens a step."
    assert said in capfd.readouterr().out
    completions = Run.read(run.args.output_dir).spent("completions")
    assert [completions(step) for step in range(5)] == [0, 2 * 2, 4 + 6 * 2, 16 + 6 * 1, 22 + 4 * 1]


@pytest.mark.parametrize("text", ["{50: 16, 100: 32}", '{"100": 32, "50": 16}'])
def test_it_can_be_given_on_the_command_line_and_in_a_file(tmp_path, text):
    def parsed(*argv: str) -> ESConfig:
        (args,) = Parser(ESConfig).parse_args_and_config(["--output_dir", str(tmp_path), *argv])
        return args

    (tmp_path / "run.yaml").write_text(f"population_size_schedule: {text}\n")
    for args in (parsed("--population_size_schedule", text), parsed("--config", str(tmp_path / "run.yaml"))):
        assert list(args.population_size_schedule.items()) == [(50, 16), (100, 32)]
        assert [args.population_size_after(steps) for steps in (0, 49, 50, 99, 100)] == [30, 30, 16, 16, 32]
        assert args.largest_population == 32
        copy = dataclasses.replace(args, sigma=0.1)
        assert copy.population_size_schedule == args.population_size_schedule
    assert parsed("--population_size_schedule", "{}").population_size_schedule is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"population_size_schedule": {10: 1}}, "sizes must be at least 2"),
        ({"population_size_schedule": {0: 4}}, "begin after at least 1 step"),
        ({"num_prompts_per_step_schedule": {10: 0}}, "numbers must be at least 1"),
        ({"num_prompts_per_step_schedule": {10: 4}, "skip_settled_prompts": 0.5}, "set skip_settled_prompts to 0"),
        ({"population_size_schedule": {10: 5}, "antithetic": True}, "evaluates members in pairs"),
        ({"population_size_schedule": [16, 32]}, "give numbers by steps, such as {50: 16, 100: 32}"),
        ({"population_size_schedule": "{50: 16"}, "give numbers by steps, such as {50: 16, 100: 32}"),
        ({"population_size_schedule": {"soon": 16}}, "it must be an integer"),
        ({"population_size_schedule": {10: 2.5}}, "it must be an integer"),
    ],
)
def test_what_cannot_be(config, options, said):
    with pytest.raises(ValueError, match=rf"`{next(iter(options))}=.*{said}"):
        config(**options)
