"""The files of a checkpoint that have the state of the evolution strategy, whole or in parts."""

from pathlib import Path
from typing import Any

import torch

from .history_file import HISTORY_NAME


def optimizer_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint's optimizer state; none if one of them is missing."""
    files = sorted(checkpoint.glob("optimizer_*-of-*.pt"))
    if files:
        return files if len(files) == int(files[0].stem.split("-of-")[1]) else []
    return [file for file in [checkpoint / "optimizer.pt"] if file.is_file()]


def check_complete(checkpoint: Path) -> None:
    """
    Raises:
        `ValueError`: If a file is missing that training cannot go on without.
    """
    missing = [
        name for name in ("scheduler.pt", "trainer_state.json", HISTORY_NAME) if not (checkpoint / name).is_file()
    ]
    if not optimizer_files(checkpoint):
        missing.insert(0, "optimizer.pt")
    if missing:
        raise ValueError(
            f"The checkpoint {checkpoint} has no {missing[0]}, so training can't be resumed from it. It was saved "
            "by another trainer or with save_only_model=True, or saving was interrupted: resume from another."
        )


def save_part(folder: Path, state: dict[str, Any], part: int, parts: int) -> None:
    """Write one of the parts in which the state is shared out."""
    torch.save(state, folder / f"optimizer_{part}-of-{parts}.pt")


def load_parts(checkpoint: Path, rank: int, group_size: int) -> list[dict[str, Any]]:
    """
    The parts of the state that a process's part may be in.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
        rank (`int`):
            Rank of the process.
        group_size (`int`):
            Processes among which the weights are shared out.
    """
    files = optimizer_files(checkpoint)
    if group_size > 1 and len(files) == group_size:
        files = [checkpoint / f"optimizer_{rank % group_size}-of-{group_size}.pt"]
    # Mapped into memory: a process that needs a part reads a part
    return [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]
