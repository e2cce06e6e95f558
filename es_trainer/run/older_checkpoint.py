"""Optimizer states of earlier versions: `optimizer.pt`, or `optimizer_R-of-W.pt` of each process with its part."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def state_files(checkpoint: Path) -> list[Path]:
    """The files of the state; none if one of them is missing."""
    files = sorted(checkpoint.glob("optimizer_*-of-*.pt"))
    if files:
        return files if len(files) == int(files[0].stem.split("-of-")[1]) else []
    return [file for file in [checkpoint / "optimizer.pt"] if file.is_file()]


def read_states(checkpoint: Path, shapes: Mapping[str, torch.Size]) -> list[dict[str, Any]]:
    """
    The state of each process, as [`EvolutionStrategy.state_dict`] has it today.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
        shapes (`Mapping[str, torch.Size]`):
            Shapes of the trained parameters.
    """
    # Mapped into memory: a process that needs a part reads a part
    states = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in state_files(checkpoint)]
    return [{**state, "slices": _slices(state, shapes)} for state in states]


def _slices(state: dict[str, Any], shapes: Mapping[str, torch.Size]) -> dict[str, tuple[Any, ...]]:
    slices: dict[str, tuple[Any, ...]] = {}
    for name, tensors in state.get("state", {}).items():
        shape = tuple(shapes.get(name, tensors["weights"].shape))
        whole = torch.Size(shape).numel()
        # Without runs, it is one piece
        piece = state["offsets"][name]["weights"], tensors["weights"].numel(), whole
        offset, length, period = state.get("runs", {}).get(name, piece)
        for key, values in tensors.items():
            if key != "start":
                slices[f"{name}/{key}"] = shape, offset, length, period, values
            elif name not in state.get("runs", {}):  # whose samples were of other weights than today's
                slices[f"{name}/start/{offset}/{length}/{period}"] = (
                    tuple(values.shape),
                    0,
                    *(values.numel(),) * 2,
                    values,
                )
    return slices
