"""Parameters whose working weights are in the memory of an inference engine, whole or in parts."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..part import Part
from .layout import Layout, same_memory


@dataclass(frozen=True)
class EngineWeights:
    """
    The weights of a parameter that an inference engine has in this process.

    Args:
        part ([`Part`]):
            Which weights of the parameter they are.
        weights (`torch.Tensor`):
            Flat view of them in the engine's memory, which they must stay in.
    """

    part: Part
    weights: torch.Tensor


class Engine(Layout):
    """
    The engine computes with the working weights. A parameter that it has whole becomes a view of them.

    Args:
        parameter (`torch.Tensor`):
            The model's parameter with the weights as they are given: whole, or this process's part of them, flat.
        engine_weights ([`EngineWeights`]):
            The engine's weights. They keep the engine's dtype.
    """

    in_place = True

    def __init__(self, parameter: torch.Tensor, engine_weights: EngineWeights):
        super().__init__(parameter)
        self._part, self._weights = engine_weights.part, engine_weights.weights

    @property
    def in_parameter(self) -> bool:
        return self._part.is_whole

    @property
    def shape(self) -> torch.Size:
        return self._part.shape

    def part(self, name: str) -> Part:
        return self._part

    def original(self) -> torch.Tensor:
        data = self.parameter.data
        return data.reshape(-1) if data.numel() == self._part.numel else self._part.of(data)

    def working(self) -> torch.Tensor:
        return self._weights

    def cast(self, dtype: torch.dtype) -> None:
        self.parameter.data = self._weights.view(self.shape) if self.in_parameter else self._weights.new_empty(0)

    def computes_with(self, working: torch.Tensor) -> bool:
        return same_memory(self.parameter.data, working) if self.in_parameter else True

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        if self._part.is_whole:
            return values
        pieces: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(pieces, None if self._part.replica else (self._part, values.cpu()))
        whole = values.new_empty(self.shape.numel(), device="cpu")
        for part, piece in filter(None, pieces):
            part.put_into(whole, piece)
        return whole
