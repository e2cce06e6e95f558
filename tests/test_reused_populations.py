"""Runs that use a population for several steps."""

import pytest
from conftest import assert_replays_and_resumes, history, letters, make_model
from datasets import Dataset


def seen_by(trainer, **options) -> list[list[tuple]]:
    """Prompts and completions of every member, by step."""
    steps: dict[int, list[tuple]] = {}

    def reward(prompts, completions, trainer_state, **kwargs):
        steps.setdefault(trainer_state.global_step, []).append((tuple(prompts), tuple(completions)))
        return letters(completions)

    trainer(reward_funcs=reward, **options).train()
    return list(steps.values())


def test_steps_have_the_same_members_and_new_prompts(trainer, tmp_path):
    steps = seen_by(trainer, num_steps_per_population=3, max_steps=4)
    (asked,) = {prompts for prompts, _ in steps[0]}
    assert all({prompts for prompts, _ in step} != {asked} for step in steps[1:])
    fresh = seen_by(trainer, max_steps=4, output_dir=str(tmp_path / "fresh"))
    drawn = [line["seeds"] for line in history(tmp_path / "fresh")]
    assert [line["seeds"] for line in history(tmp_path / "run")] == [drawn[0], drawn[0], drawn[0], drawn[3]]
    assert steps[0] == fresh[0] and steps[1] != fresh[1]


def test_sampling_has_new_random_numbers_at_each_step(trainer):
    options = {
        "train_dataset": Dataset.from_list([{"prompt": "Say one"}]),
        "num_prompts_per_step": 1,
        "num_steps_per_population": 2,
        "learning_rate": 0.0,
        "max_steps": 2,
    }
    greedy = seen_by(trainer, **options)
    assert greedy[0] == greedy[1]
    sampled = seen_by(trainer, temperature=1.0, **options)
    assert all(mine != theirs for mine, theirs in zip(*sampled, strict=True))


@pytest.mark.parametrize(
    "options", [{"antithetic": True}, {"bf16": True, "master_weights": "none", "es_optimizer": "adam"}]
)
def test_it_replays_and_resumes_in_the_middle(trainer, tmp_path, options):
    options |= {"num_steps_per_population": 3, "temperature": 1.0, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(make_model(), **options)
    whole.train()
    resumed = assert_replays_and_resumes(trainer, whole, tmp_path, **options)
    mine, theirs = ([line["rewards"] for line in history(run.args.output_dir)] for run in (resumed, whole))
    assert mine == theirs


def test_what_cannot_be(config):
    with pytest.raises(ValueError, match="`num_steps_per_population=0` is not valid: it must be at least 1"):
        config(num_steps_per_population=0)
