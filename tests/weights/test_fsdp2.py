"""Weights that FSDP2 has sharded. `train_sharded.py` is a process of a run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from test_distributed import ENVIRONMENT, free_port

from es_trainer.evolution import EvolutionStrategy
from es_trainer.run.checkpoint import load_state


HERE = Path(__file__).parent


@pytest.mark.parametrize("processes", [2, 3])  # three do not divide the rows
def test_sharded_weights_are_those_of_one_process(tmp_path, processes):
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{HERE.parent}:{HERE.parents[1]}"}
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "train_sharded.py"), str(rank), str(processes), port, str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]
    for process in started:
        _, stderr = process.communicate(timeout=180)
        assert process.returncode == 0, stderr.decode()

    # Their checkpoint goes on in one process
    options = {"lr": 0.3, "rule": "adam", "population_size": 4, "weight_decay": 0.1}
    whole, resumed = (EvolutionStrategy(list(make_model().named_parameters()), **options) for _ in range(2))
    load_state(tmp_path, resumed)
    for optimizer in [whole] * 3 + [resumed]:
        optimizer.tell(optimizer.ask(), [1.0, -2.0, 0.5, 3.0])
        optimizer.step()
    assert resumed.updates == whole.updates == 3
    for mine, theirs in zip(resumed.weights.shards, whole.weights.shards, strict=True):
        assert torch.equal(mine.trained, theirs.trained), mine.name
