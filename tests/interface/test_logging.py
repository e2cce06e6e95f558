"""What is logged, under GRPOTrainer's names, and to whom."""

import pickle
import threading
from datetime import datetime

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import TINY_RUN, letters, logs, make_model, make_tokenizer
from datasets import Dataset, IterableDataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from es_trainer.report.completions import print_completions
from es_trainer.rewards.scorer import Scorer


# Of policy gradients, groups of completions and gradients
ONLY_GRPO = {
    "grad_norm",
    "entropy",
    *(f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")),
}


def test_what_grpo_logs_and_es_has_bears_the_same_key(trainer, dataset, tmp_path):
    def second(completions, log_metric, **kwargs):
        log_metric("own/metric", 3.0)
        return [float(len(completion)) for completion in completions]

    shared = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    mine = trainer(reward_funcs=[letters, second], **shared)
    mine.train()
    options = {key: TINY_RUN[key] for key in ("use_cpu", "bf16", "max_completion_length", "report_to", "disable_tqdm")}
    args = GRPOConfig(str(tmp_path / "grpo"), logging_steps=1, save_strategy="no", **options, **shared)
    theirs = GRPOTrainer(make_model(), [letters, second], args, dataset, dataset, make_tokenizer())
    theirs.train()
    train_keys, eval_keys = (
        [set().union(*(log for log in run.state.log_history if key in log)) for run in (mine, theirs)]
        for key in ("reward", "eval_reward")
    )
    assert train_keys[1] - train_keys[0] == ONLY_GRPO
    # Evaluations are of one set of weights: there are no members to agree
    only_grpo = ONLY_GRPO - {"grad_norm"} | {"frac_reward_zero_std"}
    assert eval_keys[1] - eval_keys[0] == {f"eval_{key}" for key in only_grpo}
    assert "own/metric" in train_keys[0]


def test_what_the_trainer_logs_cannot_be_logged_by_rewards(trainer):
    run = trainer(eval_strategy="steps", eval_steps=1, max_steps=1)
    run.train()
    keys = set().union(*run.state.log_history)
    assert {"reward", "learning_rate", "rewards/letters/mean", "eval_loss", "eval_runtime", "train_runtime"} <= keys
    for key in keys:

        def reward(completions, log_metric, key=key, **kwargs):
            log_metric(key, 7.0)
            return [0.0]

        reward.__name__ = "letters"
        with pytest.raises(ValueError, match=f"'letters' gave `log_metric\\('{key}', ...\\)`, which the trainer logs"):
            Scorer(reward)([{"prompt": "a"}], ["b"], [[1]], run.state)


def test_what_was_not_logged_yet_is_in_the_closing_log(trainer, tmp_path):
    every, seldom, second = (
        trainer(logging_steps=steps, output_dir=str(tmp_path / str(steps)), log_completions=True)
        for steps in (1, 10, 2)
    )
    for run in (every, seldom, second):
        run.train()
    single, closing = logs(every), seldom.state.log_history
    assert len(single) == 3 and "reward" not in every.state.log_history[-1]
    assert len(closing) == 1 and closing[0]["train_runtime"] > 0 and closing[0]["step"] == 3
    assert closing[0]["reward"] == pytest.approx(sum(log["reward"] for log in single) / 3)
    assert closing[0]["loss"] == -closing[0]["reward"] == pytest.approx(closing[0]["train_loss"])
    assert closing[0]["num_tokens"] == single[-1]["num_tokens"]
    assert [log["step"] for log in logs(second)] == [2, 3]
    assert logs(second)[1]["reward"] == single[2]["reward"]  # of the third step alone
    files = sorted((tmp_path / "2" / "completions").iterdir())
    assert [file.name for file in files] == [f"completions_0000{step}.parquet" for step in (2, 3)]


def test_steps_of_a_run_that_failed_are_not_logged_by_the_next(trainer):
    def reward(completions, **kwargs):
        if run.state.global_step == 1 and not failed:
            failed.append(True)
            raise RuntimeError("once")
        return [100.0 if not failed else 1.0] * len(completions)

    failed: list[bool] = []
    run = trainer(reward_funcs=reward, logging_steps=10)
    with pytest.raises(RuntimeError, match="once"):
        run.train()
    run.train()
    assert run.state.log_history[-1]["reward"] == 1.0


def test_lengths_of_completions_that_ended(trainer):
    def rollout_func(prompts, trainer):
        return {"prompt_ids": [[5]] * 2, "completion_ids": [[10, 11, 2], [10, 11, 12, 13]]}

    run = trainer(rollout_func=rollout_func, max_steps=1)
    run.train()
    (log,) = logs(run)
    lengths = {name: log[f"completions/{name}_terminated_length"] for name in ("mean", "min", "max")}
    assert lengths == {"mean": 3, "min": 3, "max": 3}
    assert log["completions/mean_length"] == 3.5 and log["completions/clipped_ratio"] == 0.5


def with_extra(prompts, completions, log_extra, **kwargs):
    log_extra("length", [len(completion) for completion in completions])
    return letters(completions)


def test_completions_are_kept_as_parquet(trainer, tmp_path, capsys):
    run = trainer(reward_funcs=with_extra, log_completions=True, num_completions_to_print=1)
    run.train()
    files = sorted((tmp_path / "run" / "completions").iterdir())
    assert [file.name for file in files] == [f"completions_0000{step}.parquet" for step in (1, 2, 3)]
    table = pyarrow.parquet.read_table(files[0]).to_pydict()
    assert list(table) == ["step", "prompt", "completion", "with_extra", "length", "advantage"]
    assert table["step"] == [1, 1] and table["prompt"][0].startswith("Say ")
    assert table["length"] == [len(text) for text in table["completion"]]
    assert table["with_extra"] == pytest.approx(letters(table["completion"]))
    for file, log in zip(files, logs(run), strict=True):
        rewards = pyarrow.parquet.read_table(file).to_pydict()["with_extra"]
        assert sum(rewards) / 2 == pytest.approx(log["reward_max"])
    assert table["advantage"][0] == table["advantage"][1] > 0
    printed = capsys.readouterr().out
    assert printed.count("Say ") == 3  # one a step


def test_whatever_rewards_log_is_kept(trainer, tmp_path, monkeypatch):
    """Training goes on, and what fits no type of Parquet is kept as text."""
    from trackio.sqlite_storage import SQLiteStorage

    columns = {
        "mixed": [1, "x"],
        "tensors": [torch.tensor(1.5), np.array([[1, 2]])],
        "scalars": [torch.tensor(1.5), np.float32(2.5)],
        "nested": [{"a": 1}, [1]],
        "empty": [{}, {}],
        "large": [10**400 % 7, 10**30],
        "surrogate": ["\ud800", "x"],
        "objects": [object, None],
        "locks": [threading.Lock(), None],
        "[/bold]": ["[/red]", "[bold]"],
        "known": [1, None],
        "moments": [datetime(2026, 1, 2), None],
        "lists": [[1, 2], [3]],
    }

    def reward(completions, log_extra, **kwargs):
        for name, values in columns.items():
            log_extra(name, values)
        return letters(completions)

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    options = {"report_to": ["tensorboard", "trackio"], "project": "tests", "run_name": "whatever", "max_steps": 1}
    run = trainer(reward_funcs=reward, log_completions=True, **options)
    exchange = run.processes.exchange  # which sends to other processes if there are any
    run.processes.exchange = lambda work: pickle.loads(pickle.dumps(exchange(work)))
    run.train()
    table = pyarrow.parquet.read_table(tmp_path / "run" / "completions" / "completions_00001.parquet").to_pydict()
    logged = {name: table[name] for name in columns}
    assert logged.pop("locks")[0].startswith("<unlocked _thread.lock")
    assert logged == {
        "mixed": ["1", "x"],
        "tensors": ["1.5", "[[1, 2]]"],
        "scalars": [1.5, 2.5],
        "nested": ["{'a': 1}", "[1]"],
        "empty": ["{}", "{}"],
        "large": [str(10**400 % 7), str(10**30)],
        "surrogate": ["?", "x"],
        "objects": ["<class 'object'>", None],
        "[/bold]": ["[/red]", "[bold]"],
        "known": [1, None],
        "moments": [datetime(2026, 1, 2), None],
        "lists": [[1, 2], [3]],
    }
    (rows,) = [
        entry["completions"]["_value"]
        for entry in SQLiteStorage.get_logs("tests", "whatever")
        if "completions" in entry
    ]
    assert [row["lists"] for row in rows] == ["[1, 2]", "[3]"] and rows[0]["mixed"] == "1"


def test_columns_of_the_same_name_hide_nothing(trainer, tmp_path):
    def completion(completions, log_extra, **kwargs):
        for name in ("completion", "step", "letters"):
            log_extra(name, ["x"] * len(completions))
        return [0.5] * len(completions)

    def prompt(completions, **kwargs):
        return [0.25] * len(completions)

    def step(completions, **kwargs):
        return [0.75] * len(completions)

    def advantage(completions, **kwargs):
        return [0.0] * len(completions)

    rewards = [letters, completion, prompt, step, advantage]
    trainer(reward_funcs=rewards, log_completions=True, max_steps=1).train()
    table = pyarrow.parquet.read_table(tmp_path / "run" / "completions" / "completions_00001.parquet").to_pydict()
    columns = ["step", "prompt", "completion", "letters", "completion_2", "prompt_2", "step_2", "advantage_2"]
    columns += ["completion_3", "step_3", "letters_2", "advantage"]
    assert list(table) == columns
    assert table["step"] == [1, 1] and table["prompt"][0].startswith("Say ")
    assert table["letters"] == pytest.approx(letters(table["completion"]))
    assert [table[name][0] for name in columns[4:8]] == [0.5, 0.25, 0.75, 0.0]
    assert table["completion_3"] == table["letters_2"] == ["x", "x"]
    assert table["advantage"][0] > 0


def test_messages_without_content_are_printed(trainer, capsys, monkeypatch, tmp_path):
    """Tool calls, parts of other kinds than text; rows of a stream have what they were given and nothing else."""
    prompt = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "tool_calls": [{"name": "look"}]},
        {"role": "tool", "name": "look", "content": "a cat"},
        {"role": "assistant", "content": None},
    ]

    def rows():
        while True:
            yield {"prompt": prompt}

    def rollout_func(prompts, trainer):
        return {"prompt_ids": [[5]] * len(prompts), "completion_ids": [[70, 2]] * len(prompts)}

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    stream = IterableDataset.from_generator(rows)
    options = {"rollout_func": rollout_func, "log_completions": True, "max_steps": 1, "report_to": "tensorboard"}
    trainer(train_dataset=stream, eval_dataset=None, **options).train()
    printed = capsys.readouterr().out
    for line in ("user: <image>what is it?", "assistant: [{'name': 'look'}]", "tool: a cat", "assistant: "):
        assert line in printed


def test_what_looks_like_markup_is_printed_as_it_is(capsys):
    print_completions("Step 1", {"prompt": ["[/a] say"], "completion": ["[bold]hi[/b]"], "reward": [0.5]})
    printed = capsys.readouterr().out
    assert "[/a] say" in printed and "[bold]hi[/b]" in printed


def conversations() -> Dataset:
    words = ("one", "one", "two|three\nfour")
    return Dataset.from_list([{"prompt": [{"role": "user", "content": f"Say {word}"}]} for word in words])


OPTIONS = {"log_completions": True, "num_prompts_per_step": 3, "max_steps": 2, "reward_funcs": with_extra}


def test_tensorboard_gets_scalars_and_completions(trainer, tmp_path, monkeypatch):
    def reward(completions, **kwargs):
        return letters(completions)

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    options = {**OPTIONS, "reward_funcs": reward}
    trainer(train_dataset=conversations(), eval_dataset=None, report_to="tensorboard", **options).train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {"train/reward", "train/reward_std", "train/rewards/reward/mean"} <= set(events.Tags()["scalars"])
    texts = events.Tensors("completions/text_summary")
    assert [event.step for event in texts] == [1, 2]
    lines = texts[0].tensor_proto.string_val[0].decode().splitlines()
    assert lines[0] == "| step | prompt | completion | reward | advantage |"
    assert len(lines) == 2 + 3 and any("user: Say two\\|three<br>four" in line for line in lines)


def test_wandb_gets_scalars_and_completions(trainer, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer(
        train_dataset=conversations(), eval_dataset=None, report_to="wandb", log_unique_prompts=True, **OPTIONS
    ).train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert "train/reward" in summary
    table = summary["completions"]
    assert table["_type"] == "table-file" and table["nrows"] == 2  # of 3 prompts, two are the same
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_trackio_gets_scalars_and_completions(trainer):
    from trackio.sqlite_storage import SQLiteStorage

    options = {"report_to": "trackio", "project": "tests", "run_name": "completions", **OPTIONS}
    run = trainer(train_dataset=conversations(), eval_strategy="steps", eval_steps=2, **options)
    run.train()
    entries = SQLiteStorage.get_logs("tests", "completions")
    of_steps = [entry for entry in entries if "train/reward" in entry]
    assert [entry["train/global_step"] for entry in of_steps] == [1, 2]
    for name in ("reward", "reward_std", "signal"):  # those that docs/monitoring.md shows in the dashboard
        assert [entry[f"train/{name}"] for entry in of_steps] == pytest.approx([log[name] for log in logs(run)])
    (held_out,) = [entry for entry in entries if "eval/reward" in entry]
    assert held_out["train/global_step"] == 2
    tables = [entry["completions"]["_value"] for entry in entries if "completions" in entry]
    assert [[row["step"] for row in table] for table in tables] == [[1] * 3, [2] * 3]
    assert tables[0][0]["prompt"].startswith("user: Say ")


def test_uploading_completions_needs_completions(trainer):
    with pytest.raises(ValueError, match="`log_completions_hub_repo='org/logs'` is not valid.*log_completions=True"):
        trainer(log_completions_hub_repo="org/logs")


def test_rewards_are_drawn_at_each_save(trainer, tmp_path):
    picture = tmp_path / "run" / "reward.png"
    pictures = []

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            pictures.append(picture.read_bytes())

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    run = trainer(callbacks=[Keep()], **options)
    run.train()
    run.save_model(str(tmp_path / "model"))
    pictures.append(picture.read_bytes())
    assert all(data.startswith(b"\x89PNG") for data in pictures)
    assert len(set(pictures)) == 2 and len(pictures) == 3  # the last one again
