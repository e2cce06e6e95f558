"""The files of a checkpoint that have the state of the evolution strategy, each process's part of it."""

import json
import shutil
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

from ..evolution import EvolutionStrategy
from ..weights.distributed_checkpoint import save
from .history_file import HISTORY_NAME
from .older_checkpoint import read_states, state_files


FOLDER = "optimizer"
FACTS = "state.json"


def has_state(checkpoint: Path) -> bool:
    """Whether a checkpoint has all of the strategy's state."""
    return _is_complete(checkpoint / FOLDER) or bool(state_files(checkpoint))


def check_complete(checkpoint: Path) -> None:
    """
    Raises:
        `ValueError`: If a file is missing that training cannot go on without.
    """
    missing = [
        name for name in ("scheduler.pt", "trainer_state.json", HISTORY_NAME) if not (checkpoint / name).is_file()
    ]
    if not has_state(checkpoint):
        missing.insert(0, f"{FOLDER}/" if not (checkpoint / FOLDER).is_dir() else f"complete {FOLDER}/")
    if missing:
        raise ValueError(
            f"The checkpoint {checkpoint} has no {missing[0]}, so training can't be resumed from it. It was saved "
            "by another trainer or with save_only_model=True, or saving was interrupted: resume from another."
        )


def remove_state(checkpoint: Path) -> None:
    """Remove the state that an earlier run has left in a folder."""
    if (checkpoint / FOLDER).is_dir():
        shutil.rmtree(checkpoint / FOLDER)
    for file in checkpoint.glob("optimizer*.pt"):
        file.unlink()


def save_state(checkpoint: Path, optimizer: EvolutionStrategy, together: bool, first: bool) -> None:
    """
    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
        optimizer ([`EvolutionStrategy`]):
            Has the state, or this process's part of it.
        together (`bool`):
            Whether all processes call this.
        first (`bool`):
            Whether this process writes what all have.
    """
    save(optimizer.slices(), checkpoint / FOLDER, together)
    if first:
        (checkpoint / FOLDER / FACTS).write_text(json.dumps(optimizer.facts(), indent=2))


def load_state(checkpoint: Path, optimizer: EvolutionStrategy) -> None:
    """
    Copy the state of a checkpoint into an optimizer and the model, whatever the parts in which it was saved.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
        optimizer ([`EvolutionStrategy`]):
            What is to go on.
    """
    folder = checkpoint / FOLDER
    if folder.is_dir():
        optimizer.load(json.loads((folder / FACTS).read_text()), FileSystemReader(folder))
    else:
        optimizer.load_parts(read_states(checkpoint, {shard.name: shard.shape for shard in optimizer.weights.shards}))


def _is_complete(folder: Path) -> bool:
    if not (folder / FACTS).is_file() or not (folder / ".metadata").is_file():
        return False
    stored = FileSystemReader(folder).read_metadata().storage_data
    return all((folder / info.relative_path).is_file() for info in stored.values())
