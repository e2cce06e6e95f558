"""Runs whose sigma falls."""

import json
from pathlib import Path

import pytest
from conftest import assert_same, logs, make_model, weights

from es_trainer import replay
from es_trainer.noise import noise


LINEAR = {"sigma_schedule": "linear", "sigma_min_ratio": 0.2, "sigma": 0.1, "max_steps": 4}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.1, 0.1, 0.1, 0.1]),
        ("linear", [0.1, 0.08, 0.06, 0.04]),  # 0.02 after the last step
        ("cosine", [0.1, 0.1 * (0.2 + 0.8 * (1 + 0.5**0.5) / 2), 0.06, 0.1 * (0.2 + 0.8 * (1 - 0.5**0.5) / 2)]),
    ],
)
def test_members_are_as_far_away_as_the_schedule_says(trainer, schedule, expected):
    run = trainer(**LINEAR | {"sigma_schedule": schedule})
    name, parameter = next(iter(run.model.named_parameters()))
    found = []

    def measure(completions, **kwargs):
        shard = run.optimizer.weights.shards[0]
        (member, _) = run.optimizer.weights._inside
        values = noise.scratch(shard.trained.numel(), shard.trained.device)
        run.optimizer.weights._perturbation(shard, member.seed, 1.0).add(None, values, 0)
        moved = shard.working - shard.trained
        found.append(float((moved @ values) / (values @ values)))
        return [float(len(completion)) for completion in completions]

    run.scorer.functions[0] = measure
    run.train()
    assert found[::4] == pytest.approx(expected, rel=1e-4)
    assert [log["sigma"] for log in logs(run)] == pytest.approx(expected)


@pytest.mark.parametrize("options", [{}, {"bf16": True, "master_weights": "none"}])
def test_the_history_replays_it_and_resuming_goes_on_with_it(trainer, tmp_path, options):
    options = LINEAR | options | {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(make_model(), **options)
    whole.train()
    assert_same(weights(replay(make_model(), whole.args.output_dir)), weights(whole.model))
    resumed = trainer(make_model(), **options | {"output_dir": str(tmp_path / "resumed")})
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert_same(weights(resumed.model), weights(whole.model))
    lines = [json.loads(line) for line in (Path(whole.args.output_dir) / "history.jsonl").read_text().splitlines()]
    assert [line["sigma"] for line in lines[1:]] == pytest.approx([0.1, 0.08, 0.06, 0.04])


@pytest.mark.parametrize("wrong", [{"sigma_min_ratio": 0.0}, {"sigma_min_ratio": 1.5}, {"sigma_schedule": "exp"}])
def test_what_cannot_be(config, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"`{name}="):
        config(**LINEAR | wrong)
