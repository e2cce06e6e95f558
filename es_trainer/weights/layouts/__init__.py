"""How the weights of a parameter lie in the processes of a run, a file for each way."""

import torch
from torch.distributed.tensor import DTensor

from .engine import Engine, EngineWeights
from .fsdp2 import FSDP2
from .layout import Layout
from .quantized import Quantized
from .whole import Whole
from .zero3 import Zero3, is_partitioned


__all__ = ["FSDP2", "Engine", "EngineWeights", "Layout", "Quantized", "Whole", "Zero3", "layout_of"]


def layout_of(tensor: torch.Tensor, engine_weights: EngineWeights | None = None) -> Layout:
    """
    The layout of a parameter or buffer of a model.

    Args:
        tensor (`torch.Tensor`):
            The parameter or buffer.
        engine_weights ([`EngineWeights`], *optional*):
            Where an inference engine keeps it.
    """
    if engine_weights is not None:
        return Engine(tensor, engine_weights)
    if isinstance(tensor, DTensor):
        return FSDP2(tensor)
    return Zero3(tensor) if is_partitioned(tensor) else Whole(tensor)
