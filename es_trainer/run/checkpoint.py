"""The files of a checkpoint: the state of the evolution strategy, and checksums of all; which checkpoint is good."""

import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from ..evolution import EvolutionStrategy
from ..weights.distributed_checkpoint import Files, save
from .history_file import HISTORY_NAME
from .older_checkpoint import read_states, state_files


logger = logging.get_logger(__name__)

FOLDER = "optimizer"
FACTS = "state.json"
CHECKSUMS = "checksums.json"  # JSON, which is not valid if it is cut


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


def write_checksums(checkpoint: Path) -> None:
    """Write the SHA-256 of each file of a checkpoint, now that all are written."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / CHECKSUMS)
    with ThreadPoolExecutor() as threads:
        sums = dict(
            zip((str(file.relative_to(checkpoint)) for file in files), threads.map(_sha256, files), strict=True)
        )
    (checkpoint / CHECKSUMS).write_text(json.dumps(sums, indent=2))


def check_content(checkpoint: Path) -> None:
    """
    Compare the files of a checkpoint with their checksums, if it has them: those of earlier versions do not.

    Raises:
        `ValueError`: If a file is not what was saved.
    """
    if not (checkpoint / CHECKSUMS).is_file():
        return
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_bytes())
    except ValueError as error:
        raise _damaged(checkpoint, CHECKSUMS, f"it is not JSON ({error})") from error
    with ThreadPoolExecutor() as threads:
        found = threads.map(lambda name: _sha256(checkpoint / name) if (checkpoint / name).is_file() else None, sums)
        for name, sha256 in zip(sums, found, strict=True):
            if sha256 != sums[name]:
                how = "it is missing" if sha256 is None else "it has another checksum"
                raise _damaged(checkpoint, name, f"{CHECKSUMS} names it, but {how}")


def last_good_checkpoint(folder: Path) -> Path | None:
    """
    The newest checkpoint of a run that is complete and undamaged; others are passed over with a warning.

    Raises:
        `ValueError`: If there are checkpoints, of which none is good, and no history either.
    """
    problem = None
    for checkpoint in map(Path, reversed(sort_checkpoints(str(folder)))):
        try:
            check_complete(checkpoint)
            check_content(checkpoint)
        except ValueError as error:
            problem = error
            logger.warning(f"`resume_from_checkpoint=True` passes over {checkpoint.name}: {error}")
            continue
        return checkpoint
    if problem is not None and not (folder / HISTORY_NAME).is_file():
        raise problem
    return None


def date_by_steps(folder: Path) -> None:
    """Where the clock has gone back, give the checkpoints of a run earlier dates, in the order of their steps."""
    checkpoints, now = sort_checkpoints(str(folder)), time.time()
    if all(os.path.getmtime(checkpoint) < now for checkpoint in checkpoints):
        return
    for seconds, checkpoint in enumerate(reversed(checkpoints), 1):
        os.utime(checkpoint, (now - seconds, now - seconds))


def remove_state(checkpoint: Path) -> None:
    """Remove the state that an earlier run has left in a folder."""
    (checkpoint / CHECKSUMS).unlink(missing_ok=True)
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


def load_scheduler(checkpoint: Path) -> dict[str, Any]:
    """
    The state of the scheduler of learning rates.

    Raises:
        `ValueError`: If the file does not have one.
    """
    file = checkpoint / "scheduler.pt"
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:  # bytes that are no pickle can raise anything
        raise ValueError(
            f"{file} cannot be read as the state of a scheduler ({type(error).__name__}). It was damaged, or made by "
            "someone who wants to run code here: resume from another checkpoint."
        ) from error


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
        optimizer.load(json.loads((folder / FACTS).read_text()), Files(folder))
    else:
        optimizer.load_parts(read_states(checkpoint, {shard.name: shard.shape for shard in optimizer.weights.shards}))


def _is_complete(folder: Path) -> bool:
    if not (folder / FACTS).is_file() or not (folder / ".metadata").is_file():
        return False
    stored = Files(folder).read_metadata().storage_data
    return all((folder / info.relative_path).is_file() for info in stored.values())


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _damaged(checkpoint: Path, name: str, how: str) -> ValueError:
    return ValueError(
        f"The file {name} of the checkpoint {checkpoint} is not what was saved: {how}. The disk or a copy has damaged "
        "it: resume from another checkpoint, or with `resume_from_checkpoint=True` from the newest one that is good."
    )
