"""Several processes with an engine in each, or with a tensor-parallel one for all."""

import json

import pytest
import tiny
from conftest import assert_same
from safetensors.torch import load_file
from test_distributed import RECIPES, errors, launched, records


pytestmark = pytest.mark.slow  # each launch starts an engine in every process


TWO = RECIPES / "cpu_two_processes.yaml"
SHARDED = {"use_vllm": True, "vllm_tensor_parallel_size": 2}
SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of runs that differ in how processes share the work only."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {
        "plain": {"processes": 1, "config": {"use_vllm": False} | SAVING},
        "one": {"processes": 1, "config": {"use_vllm": True}},
        "two": {
            "processes": 2,
            "config": {"use_vllm": True},
            "model_object": True,
            "model_options": tiny.HEADS,
        },
        "sharded": {"processes": 2, "config": SHARDED | SAVING},
        "resumed": {"processes": 2, "config": SHARDED | SAVING, "resume": str(folder / "sharded" / "checkpoint-2")},
        "from two parts": {
            "processes": 1,
            "config": {"use_vllm": True},
            "resume": str(folder / "sharded" / "checkpoint-2"),
        },
        "from the whole": {"processes": 2, "config": SHARDED, "resume": str(folder / "plain" / "checkpoint-2")},
        "failed": {"processes": 2, "config": SHARDED, "fail_at": 2, "fail_rank": 0},
        "adapters": {"processes": 2, "config": SHARDED | {"perturbation": "low_rank", "vllm_lora": True}},
        "adapters alone": {
            "processes": 1,
            "config": {"use_vllm": True, "perturbation": "low_rank", "vllm_lora": True},
        },
        "adapter": {"processes": 2, "config": SHARDED | {"learning_rate": 0.2}, "adapter": True},
        "plain adapter": {
            "processes": 1,
            "config": {"use_vllm": False, "learning_rate": 0.2},
            "adapter": True,
        },
    }
    for name, run in runs.items():
        processes = run.pop("processes")
        run = {"output_dir": str(folder / name), "evaluate": True, **run}
        launched(TWO, processes, tiny.tiny_folder(), [run])
    return folder


def saved(folder, name="model"):
    return load_file(folder / "final" / f"{name}.safetensors")


def rewards(folder, rank=0):
    record = json.loads((folder / f"record-{rank}.json").read_text())
    return [log["reward"] for log in record["history"] if "loss" in log], record["evaluation"]["eval_reward"]


@pytest.mark.parametrize("name", ["one", "two", "sharded", "resumed", "from two parts", "from the whole"])
def test_runs_end_with_the_same_weights(folder, name):
    records(folder / name)
    assert_same(saved(folder / name), saved(folder / "plain"))
    assert rewards(folder / name) == rewards(folder / "plain")


def test_every_process_evaluates_members(folder):
    mine, other = records(folder / "two")
    assert mine["evaluated"] and other["evaluated"]
    assert rewards(folder / "two") == rewards(folder / "two", rank=1)


def test_one_process_of_a_group_scores(folder):
    mine, other = records(folder / "sharded")
    assert mine["evaluated"] == 7 * 3 and other["evaluated"] == 0
    norms = [
        [log["update_norm"] for log in records(folder / name)[0]["history"] if "loss" in log]
        for name in ("sharded", "plain")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_an_error_of_the_process_that_scores_ends_all_of_its_group(folder):
    mine, other = errors(folder / "failed")
    assert "no reward today" in mine and mine.startswith("RuntimeError")
    assert "Process 0 failed, so all processes end here" in other


def test_sharded_adapters(folder):
    assert_same(saved(folder / "adapters"), saved(folder / "adapters alone"))
    assert rewards(folder / "adapters") == rewards(folder / "adapters alone")


def test_an_adapter_of_a_sharded_model(folder):
    mine, theirs = (folder / name for name in ("adapter", "plain adapter"))
    assert_same(saved(mine, "adapter_model"), saved(theirs, "adapter_model"))
    assert rewards(mine) == rewards(theirs)
    records(mine)
