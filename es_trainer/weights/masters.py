"""Float32 masters of the working weights: on their device, in host memory, or none."""

import torch

from ..choices import MasterWeights
from .pinned import PinnedMemory


def make_master(
    original: torch.Tensor, working: torch.Tensor, kind: MasterWeights, pinned: PinnedMemory
) -> torch.Tensor | None:
    """
    The master of a shard.

    Args:
        original (`torch.Tensor`):
            The weights as they were loaded.
        working (`torch.Tensor`):
            The working weights.
        kind (`str`):
            `"device"`, `"host"` or `"none"`; see [`Weights`].
        pinned ([`PinnedMemory`]):
            Makes masters in host memory that a GPU copies from.
    """
    if kind == "none":
        return None
    if kind == "device":
        # Nothing is copied if the model computes in another dtype than float32
        return original.to(working.device, torch.float32, copy=original.data_ptr() == working.data_ptr())
    return pinned.copy(original, torch.float32, working.device)
