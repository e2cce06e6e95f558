"""Pushing to the Hub, with its client and a small server (`hub_server.py`)."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from hub_run import BASE
from hub_server import TOKEN, Hub, Repo, serve
from safetensors.torch import load, load_file

from es_trainer import replay


SCRIPT = Path(__file__).with_name("hub_run.py")

EACH_STEP = {"save_strategy": "steps", "save_steps": 1}
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
DATASET = "organisation/data"
RUNS: dict[str, dict[str, Any]] = {
    **{strategy: {"config": {**EACH_STEP, "hub_strategy": strategy}} for strategy in STRATEGIES},
    "unsaved": {"config": {"hub_model_id": "short"}, "push": {"dataset_name": DATASET, "tags": "mine"}},
    "private": {"config": {"hub_model_id": "organisation/secret", "hub_private_repo": True, "hub_token": TOKEN}},
    "logged": {
        "config": {"log_completions": True, "log_completions_hub_repo": "user/logs", "hub_model_id": "user/logged"}
    },
    # An upload takes longer than a step; with files that no other run has uploaded
    "slow": {"config": {**EACH_STEP, "seed": 7}, "wait": False},
    # The network fails at the push of steps 2 and 3
    "dropped": {"config": EACH_STEP},
    "unavailable": {"config": {**EACH_STEP, "hub_strategy": "checkpoint"}},
    "lost": {"config": EACH_STEP},
    "wrong token": {"config": {"hub_model_id": "token", "hub_token": "hf_wrong"}},
}
MODEL_FILES = {
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("README.md", "history.jsonl", "reward.png"),
}
CHECKPOINT_FILES = {
    *("model.safetensors", "scheduler.pt", "trainer_state.json", "history.jsonl", "checksums.json"),
    *("optimizer/.metadata", "optimizer/__0_0.distcp", "optimizer/state.json"),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as hub:
        hub.slow = {"user/slow.git": 1.0}  # between the checksums of files and their uploads
        hub.fail("models/user/dropped/commit", after=1, times=2)
        hub.fail("models/user/unavailable/commit", after=2, times=4, status=503)
        hub.fail("models/user/lost/commit")
        yield hub


@pytest.fixture(scope="module")
def folder(hub, tmp_path_factory) -> Path:
    """Where all runs have been."""
    folder = tmp_path_factory.mktemp("hub")
    environment = {
        **{**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")},
        **{"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"},  # xet has a protocol of its own
    }
    runs = [{"output_dir": str(folder / name), **run} for name, run in RUNS.items()]
    subprocess.run([sys.executable, str(SCRIPT), json.dumps(runs)], env=environment, check=True, timeout=300)
    return folder


def record(folder: Path, name: str) -> dict[str, Any]:
    """What the run found on the Hub afterwards."""
    found = json.loads((folder / f"{name}.json").read_text())
    assert found["error"] is None
    return found


def warnings(folder: Path, name: str) -> list[str]:
    return (folder / f"{name}.log").read_text().splitlines()


def messages(repo: Repo) -> list[str]:
    return [commit.message for commit in repo.commits]


def under(files: dict[str, bytes], prefix: str) -> dict[str, bytes]:
    return {path.removeprefix(prefix): data for path, data in files.items() if path.startswith(prefix)}


def assert_is_copy(files: dict[str, bytes], folder: Path) -> None:
    assert files == {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


COMPLETE = [name for name in RUNS if name not in ("lost", "wrong token")]


@pytest.mark.parametrize("name", COMPLETE)
def test_what_arrives_is_the_local_model_and_loads_back(hub, folder, name):
    files = hub.models[record(folder, name)["name"]].files
    assert MODEL_FILES <= files.keys()
    assert all(data == (folder / name / path).read_bytes() for path, data in files.items() if path in MODEL_FILES)
    assert files["reward.png"].startswith(b"\x89PNG")
    assert_same(load_file(folder / name / "loaded" / "model.safetensors"), load(files["model.safetensors"]))
    assert (folder / name / "snapshot" / "model.safetensors").read_bytes() == files["model.safetensors"]
    tokenizer = (folder / name / "loaded" / "tokenizer.json").read_text()
    assert json.loads(tokenizer) == json.loads(files["tokenizer.json"])
    assert (folder / name / "loaded" / "chat_template.jinja").read_bytes() == files["chat_template.jinja"]


@pytest.mark.parametrize("name", COMPLETE)
def test_the_history_on_the_hub_rebuilds_the_model_on_the_hub(hub, folder, model_folder, name):
    files = hub.models[record(folder, name)["name"]].files
    trained = load(files["model.safetensors"])
    assert_same(load_file(folder / name / "replayed" / "model.safetensors"), trained)
    assert not torch.equal(
        load(hub.models[BASE].files["model.safetensors"])["model.norm.weight"], trained["model.norm.weight"]
    )
    history = folder / f"{name}.jsonl"
    history.write_bytes(files["history.jsonl"])
    replay(model_folder, history).save_pretrained(folder / f"{name} from a folder")
    assert_same(load_file(folder / f"{name} from a folder" / "model.safetensors"), trained)


def test_strategies_push_when_they_should(hub, folder):
    for name in STRATEGIES:
        record(folder, name)
    during = [f"Training in progress, step {step}" for step in (1, 2, 3)]
    both = [message for step in during for message in (step, f"{step}, checkpoint")]
    found = {name: messages(hub.models[f"user/{name}"])[1:] for name in STRATEGIES}
    assert found["end"] == ["End of training"]
    assert found["every_save"][:3] == during
    assert found["checkpoint"][:6] == found["all_checkpoints"][:6] == both
    assert all(set(messages[6:]) <= {"End of training"} for messages in found.values())


def test_checkpoints_arrive_as_they_are(hub, folder):
    last = under(hub.models["user/checkpoint"].files, "last-checkpoint/")
    assert CHECKPOINT_FILES <= last.keys()
    assert_is_copy(last, folder / "checkpoint" / "checkpoint-3")
    for step in (1, 2, 3):
        files = under(hub.models["user/all_checkpoints"].files, f"checkpoint-{step}/")
        assert_is_copy(files, folder / "all_checkpoints" / f"checkpoint-{step}")
    for name in ("end", "every_save"):
        assert not any("checkpoint" in path for path in hub.models[f"user/{name}"].files)


def test_each_push_of_a_run_is_of_one_moment(hub, folder):
    for step, commit in enumerate(hub.models["user/every_save"].commits[1:4], start=1):
        checkpoint = folder / "every_save" / f"checkpoint-{step}"
        for path in ("model.safetensors", "history.jsonl"):
            assert commit.files[path].data == (checkpoint / path).read_bytes()


def test_training_goes_on_during_a_slow_push_without_spoiling_it(hub, folder):
    record(folder, "slow")
    assert not warnings(folder, "slow")
    first = hub.models["user/slow"].commits[1]
    assert first.message == "Training in progress, step 1"
    checkpoint = folder / "slow" / "checkpoint-1"
    assert first.files["model.safetensors"].data == (checkpoint / "model.safetensors").read_bytes()
    # The run has gone on with its history
    assert first.files["history.jsonl"].data.startswith((checkpoint / "history.jsonl").read_bytes())


def test_repositories_are_named_as_asked(hub, folder):
    names = {"end": "user/end", "unsaved": "user/short", "private": "organisation/secret"}
    assert {name: record(folder, name)["name"] for name in names} == names


def test_a_private_repository_is_read_with_the_token_only(hub, folder):
    assert hub.models["organisation/secret"].private and not record(folder, "private")["public"]
    assert not hub.models["user/end"].private and record(folder, "end")["public"]


def test_the_token_is_not_pushed(hub):
    for name, repo in hub.models.items():
        leaks = [path for path, data in repo.files.items() if TOKEN.encode() in data]
        assert not leaks, name


def test_the_card_says_what_was_trained_how(hub, folder):
    found = record(folder, "unsaved")
    card, text = found["card"], found["text"]
    assert {"es-trainer", "evolution-strategies", "mine"} <= set(card["tags"])
    assert (card["base_model"], card["datasets"]) == (BASE, DATASET)
    assert (card["library_name"], card["pipeline_tag"]) == ("transformers", "text-generation")
    assert "2509.24372" in text and "![" in text and "(reward.png)" in text
    assert "`population_size` | 4 |" in text and "`sigma` | 0.05 |" in text
    assert 'from_pretrained("user/short")' in text
    assert f'replay("{BASE}", hf_hub_download("user/short", "history.jsonl"))' in text
    assert "| prompt | before | after |" in text and "| Say one |" in text
    for package in ("es_trainer", "transformers", "torch", "trl"):
        assert f"- {package}: " in text
    assert "@article{qiu2025evolution" in text and "@software{es_trainer" in text
    assert str(folder) not in text


def test_completions_arrive(hub, folder):
    record(folder, "logged")
    files = hub.datasets["user/logs"].files
    logs = {path: data for path, data in files.items() if path.endswith(".parquet")}
    assert len(logs) == 3
    steps = [set(pandas.read_parquet(io.BytesIO(data))["step"]) for _, data in sorted(logs.items())]
    assert steps == [{1}, {2}, {3}]
    for path, data in logs.items():
        assert data == (folder / "logged" / "completions" / path).read_bytes()
    assert b"user/logged" in files["README.md"]


# ---- what goes wrong ----


@pytest.mark.parametrize(("name", "failed"), [("dropped", 2), ("unavailable", 4)])
def test_a_push_that_fails_is_told_and_made_up_for(hub, folder, name, failed):
    """That all is on the Hub in the end, and loads back, is tested above."""
    record(folder, name)
    assert len(warnings(folder, name)) == failed
    assert all("Hub" in warning for warning in warnings(folder, name))
    assert sorted(path.name for path in (folder / name).glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (1, 2, 3)]
    for path in (folder / name).glob("checkpoint-*"):
        assert all((path / file).is_file() for file in CHECKPOINT_FILES)
    assert messages(hub.models[f"user/{name}"])[-1] == "End of training"


def test_a_last_push_that_fails_is_an_error_and_loses_nothing(hub, folder):
    found = json.loads((folder / "lost.json").read_text())
    assert "disconnected" in found["error"]
    assert MODEL_FILES <= set(os.listdir(folder / "lost"))
    assert len(list((folder / "lost").glob("checkpoint-*"))) == 3
    assert messages(hub.models["user/lost"]) == ["initial commit"]


def test_a_wrong_token_is_an_error_before_training(hub, folder):
    found = json.loads((folder / "wrong token.json").read_text())
    assert "401" in found["error"]
    assert "user/token" not in hub.models
    assert not (folder / "wrong token" / "history.jsonl").exists()
