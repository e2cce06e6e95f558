"""A state in files, saved by some processes and loaded by others. `save_parts.py` is a process that saves."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_distributed import ENVIRONMENT, free_port
from test_engine_weights import LowRank, kept, make, step
from torch.distributed.checkpoint import FileSystemReader

from es_trainer.run.checkpoint import check_complete, has_state, load_state, remove_state, save_state


HERE = Path(__file__).parent


def optimizer_of(rank: int | None):
    return make(LowRank(2), rank, rule="adam", anchor_decay=0.1)[1]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Saved by two processes, each with its parts."""
    folder, port = tmp_path_factory.mktemp("parts"), free_port()
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{HERE.parent}:{HERE.parents[1]}"}
    command = [sys.executable, str(HERE / "save_parts.py")]
    processes = [
        subprocess.Popen([*command, str(rank), str(port), str(folder)], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr.decode()
    return folder


@pytest.fixture
def whole(tmp_path) -> Path:
    """Saved by a process that has all."""
    optimizer = optimizer_of(None)
    step(optimizer)
    save_state(tmp_path / "whole", optimizer, together=False, first=True)
    return tmp_path / "whole"


@pytest.mark.parametrize("after", [None, 0, 1])
@pytest.mark.parametrize("before", ["parts", "whole"])
def test_a_state_goes_on_in_other_parts(request, before, after):
    expected, loaded = optimizer_of(after), optimizer_of(after)
    step(expected)
    load_state(request.getfixturevalue(before), loaded)
    assert loaded.updates == 1
    for optimizer in (expected, loaded):
        step(optimizer)
    for key, (_, values) in kept(expected).items():
        assert torch.equal(kept(loaded)[key][1], values), key
    assert loaded.distance_from_start() == expected.distance_from_start() > 0


def test_what_two_processes_have_is_written_once(parts):
    metadata = FileSystemReader(parts / "optimizer").read_metadata()
    files = {}
    for index, info in metadata.storage_data.items():
        files.setdefault(index.fqn, []).append(info.relative_path)
    assert files["whole/weights"] == files["vector/exp_avg"] == ["__0_0.distcp"]
    assert sorted(files["columns/weights"]) == ["__0_0.distcp", "__1_0.distcp"]
    assert metadata.state_dict_metadata["columns/weights"].size == torch.Size((7, 12))


def test_a_state_without_one_of_its_files_is_none(parts, tmp_path):
    shutil.copytree(parts, tmp_path / "copy")
    assert has_state(tmp_path / "copy")
    (tmp_path / "copy" / "optimizer" / "__1_0.distcp").unlink()
    assert not has_state(tmp_path / "copy")
    with pytest.raises(ValueError, match="has no complete optimizer/, so training can't be resumed"):
        check_complete(tmp_path / "copy")
    remove_state(tmp_path / "copy")
    with pytest.raises(ValueError, match="has no optimizer/, so training can't be resumed"):
        check_complete(tmp_path / "copy")


# ---- files of earlier versions ----


def write_as_formerly(folder: Path, optimizers: list) -> None:
    """As version 0.1 wrote the state: one file, or one for each process with where its pieces begin."""
    folder.mkdir()
    for rank, optimizer in enumerate(optimizers):
        parts = [shard.part for shard in optimizer.weights.shards]
        state = {
            **optimizer.facts(),
            "state": {
                shard.name: {"weights": shard.trained, **optimizer.state[shard.parameter]}
                for shard in optimizer.weights.shards
            },
            "offsets": {
                part.name: dict.fromkeys(("weights", "exp_avg", "exp_avg_sq", "anchor", "start"), part.offset)
                for part in parts
            },
            "runs": {part.name: (part.offset, part.length, part.period) for part in parts if not part.is_contiguous},
        }
        name = "optimizer.pt" if len(optimizers) == 1 else f"optimizer_{rank}-of-{len(optimizers)}.pt"
        torch.save(state, folder / name)


@pytest.mark.parametrize("after", [None, 0, 1])
@pytest.mark.parametrize("before", [(None,), (0, 1)], ids=["whole", "parts"])
def test_files_of_earlier_versions_are_read(tmp_path, before, after):
    saved = [optimizer_of(rank) for rank in before]
    expected, loaded = optimizer_of(after), optimizer_of(after)
    for optimizer in [*saved, expected]:
        step(optimizer)
    write_as_formerly(tmp_path / "older", saved)
    assert has_state(tmp_path / "older")
    load_state(tmp_path / "older", loaded)
    for optimizer in (expected, loaded):
        step(optimizer)
    for key, (_, values) in kept(expected).items():
        assert torch.equal(kept(loaded)[key][1], values), key
    (tmp_path / "older" / ("optimizer.pt" if before == (None,) else "optimizer_1-of-2.pt")).unlink()
    assert not has_state(tmp_path / "older")
