"""Runs whose sigma falls."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
from conftest import assert_replays_and_resumes, assert_same, history, logs, make_model, weights

from es_trainer import ESConfig
from es_trainer.noise import noise
from es_trainer.scripts.arguments import Parser


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
    assert_replays_and_resumes(trainer, whole, tmp_path, **options)
    assert [line["sigma"] for line in history(whole.args.output_dir)] == pytest.approx([0.1, 0.08, 0.06, 0.04])


@pytest.mark.parametrize("wrong", [{"sigma_min_ratio": 0.0}, {"sigma_min_ratio": 1.5}, {"sigma_schedule": "exp"}])
def test_what_cannot_be(config, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"`{name}="):
        config(**LINEAR | wrong)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sigma", 0.1),
        ("sigma/2", 0.05),
        ("2*sigma", 0.2),
        (" 0.5 * sigma ", 0.05),
        ("sigma * 3e-1", 0.03),
        ("0.7", 0.7),
    ],
)
def test_a_learning_rate_in_units_of_sigma(config, given, expected):
    args = config(sigma=0.1, learning_rate=given)
    assert args.learning_rate == pytest.approx(expected)
    if "sigma" in given:
        for copy in (dataclasses.replace(args, sigma=1.0), pickle.loads(pickle.dumps(args))):
            assert copy.learning_rate == pytest.approx(expected * copy.sigma / 0.1)
        assert json.loads(args.to_json_string())["learning_rate"] == pytest.approx(expected)


@pytest.mark.parametrize("given", ["sigma/", "sigma/0", "1.2.3*sigma", "sigma+1", "2 sigma", "tau/2"])
def test_what_is_no_multiple_of_sigma(config, given):
    with pytest.raises(ValueError, match="`learning_rate=.* is not valid: it must be a number"):
        config(learning_rate=given)


def test_such_a_learning_rate_follows_both_schedules(trainer, tmp_path):
    options = LINEAR | {"learning_rate": "sigma/2", "lr_scheduler_type": "linear", "save_strategy": "steps"}
    whole = trainer(make_model(), **options | {"save_steps": 2})
    whole.train()
    expected = [0.05, 0.04 * 0.75, 0.03 * 0.5, 0.02 * 0.25]
    assert [line["learning_rate"] for line in history(whole.args.output_dir)] == pytest.approx(expected)
    resumed = trainer(make_model(), **options | {"output_dir": str(tmp_path / "resumed"), "save_steps": 2})
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert_same(weights(resumed.model), weights(whole.model))


def test_it_can_be_given_on_the_command_line_and_in_a_file(tmp_path):
    def parsed(*argv: str) -> ESConfig:
        (args,) = Parser(ESConfig).parse_args_and_config(["--output_dir", str(tmp_path), *argv])
        return args

    assert parsed("--sigma", "0.1", "--learning_rate", "sigma/4").learning_rate == pytest.approx(0.025)
    (tmp_path / "run.yaml").write_text("sigma: 0.2\nlearning_rate: sigma/4\n")
    assert parsed("--config", str(tmp_path / "run.yaml")).learning_rate == pytest.approx(0.05)
    assert parsed("--learning_rate", "1e-3").learning_rate == 1e-3
    with pytest.raises(SystemExit):
        parsed("--learning_rate", "fast")
