"""`es-trainer probe`: what it tries, and what it makes of it."""

import re
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, letters, make_tokenizer

from es_trainer.cli import main
from es_trainer.probe import SIGMAS, STEP_LENGTHS, Probe
from es_trainer.run.probed import Found, TriedSigma, best_of
from es_trainer.trainer import ESTrainer


def tried(sigma, center, reward, spread, signal) -> TriedSigma:
    return TriedSigma(sigma, center, reward, spread, signal, 1.0, 1)


def test_the_best_sigma_is_the_smallest_with_a_signal_of_those_that_leave_the_model_whole():
    weak, good, loud = tried(1, 5.0, 5.0, 0.1, 0.3), tried(2, 5.0, 4.9, 0.5, 0.4), tried(4, 5.0, 4.0, 2.0, 0.8)
    broken = tried(8, 5.0, 1.0, 2.0, 0.9)
    assert (weak.expected_gain, good.expected_gain) == pytest.approx((0.03, 0.2))
    assert best_of([weak, good, loud, broken]) is good
    assert best_of([weak, loud, broken]) is loud
    assert best_of([weak, broken]) is weak
    unknown = tried(1, 5.0, 5.0, 0.0, None)
    assert best_of([unknown, broken, tried(1, 5.0, 5.0, 0.5, -0.2)]) is None


def test_a_run_takes_half_the_best_single_step():
    found = Found(before=1.0, held_out={0.5: 1.1, 1.0: 1.3, 2.0: 0.9})
    assert (found.best_held_out, found.learning_rate) == (1.0, 0.5)
    worse = Found(before=1.0, held_out={0.5: 1.0, 1.0: 0.3})
    assert worse.best_held_out is None and worse.learning_rate is None


@pytest.fixture
def probe(model_folder, dataset, config):
    return Probe(
        model_folder,
        letters,
        config(num_train_epochs=30, sigma=0.02, anchor_decay=0.1),  # of which it keeps what it tries
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=make_tokenizer(),
    )


def test_sigmas_are_tried_on_one_population_and_lengths_along_one_update(probe, model_folder, dataset, config):
    found = probe.run()
    assert [one.sigma for one in found.sigmas] == pytest.approx([0.02 * factor for factor in SIGMAS])
    _, lines = probe.history.read()
    assert len({tuple(line["seeds"]) for line in lines}) == 1
    assert len({line["metrics"]["reward/center"] for line in lines}) == 1, "weights moved, or prompts differ"

    # The same as a step of a run
    sigma, longest = found.sigma.sigma, STEP_LENGTHS[-1] * found.sigma.sigma
    assert list(found.held_out) == pytest.approx([length * sigma for length in STEP_LENGTHS])
    args = config(sigma=sigma, learning_rate=longest, max_steps=1, evaluate_center=True)
    run = ESTrainer(
        model_folder,
        letters,
        args,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=make_tokenizer(),
    )
    before = run.evaluate()["eval_reward"]
    run.train()
    assert found.before == before
    assert found.held_out[longest] == pytest.approx(run.evaluate()["eval_reward"])
    for (name, mine), theirs in zip(probe.model.named_parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)
    assert found.best_held_out is None or found.held_out[found.best_held_out] == max(found.held_out.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [({"args": None}, "`args=None` is not valid here"), ({"eval_dataset": None}, "`eval_dataset=None` is not valid")],
)
def test_a_probe_says_what_it_needs(model_folder, dataset, config, given, message):
    arguments = {"args": config(), "train_dataset": dataset, "eval_dataset": dataset}
    with pytest.raises(ValueError, match=message):
        Probe(model_folder, letters, **arguments | given)


def probe_by_command(model_folder, tmp_path, *options: str) -> None:
    own = {**TINY_RUN, "model_name_or_path": model_folder, "task": "conciseness", "max_steps": 50}
    own |= {"per_device_eval_batch_size": 16, "sigma": 0.02, "output_dir": str(tmp_path / "run")}
    own |= {"population_size": 8, "num_prompts_per_step": 8}
    argv = [text for name, value in own.items() for text in (f"--{name}", str(value))]
    assert main(["probe", *argv, *options]) == 0
    assert [path.name for path in Path(tmp_path / "run").iterdir()] == ["probe.png"]


def test_the_command(model_folder, tmp_path, capsys, monkeypatch):
    found = []
    monkeypatch.setattr(Probe, "run", lambda self, run=Probe.run: found.append(run(self)) or found[-1])
    options = ("--reward_funcs", "conftest.letters", "--population_size_schedule", "{10: 16}")
    probe_by_command(model_folder, tmp_path, *options)
    out = capsys.readouterr().out
    assert re.search(r"^sigma: [\d.e-]+$", out, re.M)
    assert re.search(r"^(learning_rate: [\d.e-]+  # half of .*|# No step raised .*)$", out, re.M)
    (tokens,) = re.findall(r"^# 50 steps: ([\d,]+) tokens, [\d.]+ s each, .* GiB on one process$", out, re.M)
    # 10 steps of the 8 members that were probed, and 40 of twice as many
    assert int(tokens.replace(",", "")) == (10 + 40 * 2) * found[0].sigma.tokens


def test_nothing_is_recommended_without_a_signal(model_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "constant.py").write_text("def reward(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    probe_by_command(model_folder, tmp_path, "--reward_funcs", "constant.reward")
    out = capsys.readouterr().out
    assert "No sigma has a signal" in out
    assert "sigma: " not in out


def test_other_updates_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["probe", "--model_name_or_path", "gpt2", "--es_optimizer", "adam", "--output_dir", str(tmp_path)])
    assert "`es_optimizer='adam'` is not valid here" in capsys.readouterr().err
