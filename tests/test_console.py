"""What is printed while a run goes on."""

import re

import pytest
from conftest import letters
from transformers import PrinterCallback, ProgressCallback

from es_trainer.report.console import LineCallback, LineProgressCallback


RUN = {"eval_strategy": "steps", "eval_steps": 2, "evaluate_center": True, "max_steps": 3}


def printed(captured) -> list[str]:
    """Lines without bars."""
    text = re.sub(r"[^\n]*\r", "", captured.out)
    return [line for line in text.splitlines() if line.startswith(("step ", "3 steps"))]


@pytest.mark.parametrize("bars", [False, True])
def test_a_log_is_a_line(trainer, capfd, bars):
    run = trainer(**RUN, disable_tqdm=not bars)
    run.train()
    first, *lines = printed(capfd.readouterr())
    assert first == "3 steps of 4 members x 2 prompts: up to 64 new tokens a step."
    number = r"-?[\d.e-]+"
    rewards = rf"step {{}}/3  reward {number}{{}}  center {number}  spread {number}  signal {number}"
    step = rewards + rf"  {number} s, 0:00:0\d left"
    change = r" \([+-][\d.e-]+\)"
    expected = [
        step.format(1, "") + rf"  {number} GiB",
        step.format(2, change),
        rf"step 2/3  held-out {number}",
        step.format(3, change),
        rf"step 3/3  held-out {number}{change}",
        r"3 steps in 0:00:\d\d",
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_changes_are_those_since_the_log_before(trainer, capfd):
    run = trainer(**RUN)
    run.train()
    rewards = [log["reward"] for log in run.state.log_history if "step_time" in log]
    said = re.findall(r"reward (\S+) \((\S+)\)", capfd.readouterr().out)
    assert said == [(f"{rewards[i]:.4g}", f"{rewards[i] - rewards[i - 1]:+.2g}") for i in (1, 2)]


def test_several_held_out_sets_have_their_names(trainer, dataset, capfd):
    run = trainer(**RUN | {"max_steps": 2}, eval_dataset={"easy": dataset, "hard": dataset})
    run.train()
    assert re.findall(r"held-out (\w+) ", capfd.readouterr().out) == ["easy", "hard"]


def test_logs_of_others_are_printed_whole(trainer, capfd):
    run = trainer(max_steps=1)
    run.log({"mine": 1.5})
    assert "'mine': 1.5" in capfd.readouterr().out


@pytest.mark.parametrize(("bars", "kind"), [(True, ProgressCallback), (False, PrinterCallback)])
def test_dicts_are_printed_on_demand(trainer, capfd, bars, kind):
    run = trainer(reward_funcs=letters, log_format="dict", disable_tqdm=not bars, max_steps=1)
    kinds = [type(callback) for callback in run.callback_handler.callbacks]
    assert kind in kinds and not {LineCallback, LineProgressCallback} & set(kinds)
    run.train()
    assert "'rewards/letters/mean'" in capfd.readouterr().out


def test_an_unknown_format(config):
    with pytest.raises(ValueError, match="`log_format='json'` is not valid: choose one of 'line', 'dict'"):
        config(log_format="json")
