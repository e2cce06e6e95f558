"""Processes that talk through NCCL, one for each GPU, against one process without a launcher: `make gpu`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_distributed import ENVIRONMENT, RUNS, SCRIPT, assert_same_run, assert_same_verdicts, errors


def several(folder: Path) -> str:
    on_gpu = {name: {**run, "config": {**run.get("config", {}), "use_cpu": False}} for name, run in RUNS.items()}
    return json.dumps([{"output_dir": str(folder / name), **run} for name, run in on_gpu.items()])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder) -> Path:
    folder = tmp_path_factory.mktemp("nccl")
    processes = torch.cuda.device_count()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    one = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "0"}
    for name, arguments, environment in (("one", [], one), ("launched", launcher, ENVIRONMENT)):
        command = [sys.executable, *arguments, str(SCRIPT), model_folder, several(folder / name)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_the_same(runs, name):
    assert errors(runs / "launched" / name) == []
    if name == "judge":
        assert_same_verdicts(runs / "launched" / name, runs / "one" / name)
    else:
        assert_same_run(runs / "launched" / name, runs / "one" / name)
