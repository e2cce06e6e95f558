"""Real processes, started by accelerate or torchrun. A launch takes seconds, so each does several runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from distributed_run import Run, train
from safetensors.torch import load_file

from es_trainer import replay


SCRIPT = Path(__file__).with_name("distributed_run.py")
RECIPES = Path(__file__).parents[1] / "recipes" / "accelerate_configs"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(config: Path, processes: int, model: str, runs: list[dict]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    command += [str(SCRIPT), model, json.dumps(runs)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def launched(config: Path, processes: int, model: str, runs: list[dict]) -> None:
    result = launch(config, processes, model, runs)
    assert result.returncode == 0, result.stderr


def records(folder: Path) -> list[dict]:
    """What each process recorded, by rank."""
    errors = [file.read_text() for file in folder.glob("error-*.txt")]
    assert not errors
    return [json.loads(file.read_text()) for file in sorted(folder.glob("record-*.json"))]


def errors(folder: Path) -> list[str]:
    """What each process raised, by rank."""
    return [file.read_text() for file in sorted(folder.glob("error-*.txt"))]


def without_clock(log: dict) -> dict:
    clock = ("seconds", "per_second", "runtime")
    log = {key: value for key, value in log.items() if not key.endswith(clock)}
    # The Trainer averages the loss over processes in float32, and sums of parts depend on the parts
    inexact = ("train_loss", "update_norm", "distance_from_start", "mean", "std", "reward", "eval_loss")
    return {key: pytest.approx(value, rel=1e-6) if key.endswith(inexact) else value for key, value in log.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same_weights(mine: Path, theirs: Path) -> None:
    mine, theirs = weights(mine), weights(theirs)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        assert mine[name].dtype == theirs[name].dtype
        assert torch.equal(mine[name], theirs[name]), name


def assert_same_run(mine: Path, theirs: Path) -> None:
    assert_same_weights(mine / "final", theirs / "final")
    ours, other = records(mine)[0], records(theirs)[0]
    assert list(map(without_clock, ours["history"])) == list(map(without_clock, other["history"]))
    for record in records(mine)[1:]:
        assert list(map(without_clock, record["history"])) == list(map(without_clock, ours["history"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


# ---- runs that are the same, however the work is divided ----

SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
RUNS = {
    "gaussian": {"evaluate": True, "config": {"eval_strategy": "steps", "eval_steps": 1}},
    "antithetic": {"config": {"antithetic": True, "population_size": 6, "fitness_shaping": "prompt_z_score"}},
    "low_rank": {"config": {"perturbation": "low_rank", "perturbation_rank": 2, "bf16": True}, "evaluate": True},
    "sampled": {"config": {"temperature": 1.0, "num_generations": 2, "generation_batch_size": 3}, "stream": True},
    "adam": {"config": {"es_optimizer": "adam", "anchor_decay": 0.1, "master_weights": "host", "bf16": True, **SAVED}},
    "more_processes": {"config": {"population_size": 2, "num_prompts_per_step": 1, "bf16": True}},
    "adapter": {"adapter": True, "config": {"learning_rate": 0.2, "bf16": True}},
    "object": {"model_object": True, "evaluate": True},
    "best": {
        "config": {
            **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
            **{"load_best_model_at_end": True, "learning_rate": 0.3, "max_steps": 4},
        },
        "evaluate": True,
    },
}


def several(folder: Path) -> list[dict]:
    return [{"output_dir": str(folder / name), **run} for name, run in RUNS.items()]


@pytest.fixture(scope="module")
def one(folder, model_folder) -> Path:
    """The runs on one process."""
    for run in several(folder / "one"):
        train(model_folder, Run(**run))
    return folder / "one"


def zero3_on_cpu(folder: Path, recipe: str = "zero3.yaml") -> Path:
    config = yaml.safe_load((RECIPES / recipe).read_text()) | {"use_cpu": True, "num_processes": 2}
    path = folder / recipe
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def two(folder, model_folder) -> Path:
    launched(RECIPES / "cpu_two_processes.yaml", 2, model_folder, several(folder / "two"))
    return folder / "two"


@pytest.fixture(scope="module")
def three(folder, model_folder) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    command += [str(SCRIPT), model_folder, json.dumps(several(folder / "three"))]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    return folder / "three"


@pytest.fixture(scope="module")
def gathered(folder, model_folder) -> Path:
    launched(zero3_on_cpu(folder), 2, model_folder, several(folder / "gathered"))
    return folder / "gathered"


@pytest.fixture(scope="module")
def lockstep(folder, model_folder) -> Path:
    runs = several(folder / "lockstep")
    for run in runs:
        run["config"] = {**run.get("config", {}), **in_lockstep(run), "ds3_gather_for_generation": False}
    launched(zero3_on_cpu(folder), 2, model_folder, runs)
    return folder / "lockstep"


def in_lockstep(run: dict) -> dict:
    # Processes share out prompts, and in bfloat16 the size of a batch decides between tokens that are nearly as likely
    return {"bf16": False} if run.get("config", {}).get("num_prompts_per_step") != 1 else {}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("way", ["two", "three", "gathered"])
def test_runs_are_the_same_on_one_process_and_on_several(request, one, way, name):
    several = request.getfixturevalue(way)
    assert_same_run(several / name, one / name)
    if RUNS[name].get("evaluate"):
        metrics = [without_clock(record["evaluation"]) for record in records(several / name)]
        assert all(metric == without_clock(records(one / name)[0]["evaluation"]) for metric in metrics)


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_the_same_in_lockstep(lockstep, one, folder, model_folder, name):
    reference = one / name
    if in_lockstep(RUNS[name]) and RUNS[name].get("config", {}).get("bf16"):
        reference = folder / "float32" / name
        run = {**RUNS[name], "config": {**RUNS[name]["config"], "bf16": False}}
        train(model_folder, Run(str(reference), **run))
    assert_same_run(lockstep / name, reference)


