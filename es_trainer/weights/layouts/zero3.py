"""Parameters that DeepSpeed ZeRO-3 has partitioned: all that is known here of its attributes of parameters."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..part import Part
from .layout import Layout, same_memory


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has partitioned the parameter."""
    return hasattr(parameter, "ds_tensor")


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The parameter's shape, whether it is partitioned or not."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


class Zero3(Layout):
    """Each process has a contiguous piece of the parameter, whose own data are empty but during forward passes."""

    in_parameter = False

    @property
    def shape(self) -> torch.Size:
        return self.parameter.ds_shape

    def part(self, name: str) -> Part:
        start = self._start()
        return Part.piece(name, self.shape, start, min(self._size(), self.parameter.ds_numel - start))

    def original(self) -> torch.Tensor:
        return self.working()

    def working(self) -> torch.Tensor:
        return self.parameter.ds_tensor.data[: self.parameter.ds_numel - self._start()]

    def cast(self, dtype: torch.dtype) -> None:
        self.parameter.data = self.parameter.data.to(dtype)
        self.parameter.ds_tensor.data = self.parameter.ds_tensor.data.to(dtype)

    def computes_with(self, working: torch.Tensor) -> bool:
        return same_memory(self.working(), working)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        padded = F.pad(values.to(self.parameter.device), (0, self._size() - values.numel()))
        whole = padded.new_empty(self._size() * dist.get_world_size())
        # Its name before torch 2.13, which warns of it
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(whole, padded)
        return whole[: self.parameter.ds_numel]

    def _size(self) -> int:
        """Weights of each piece. They are of equal size: what is behind the end of the parameter is padding."""
        return self.parameter.ds_tensor.numel()

    def _start(self) -> int:
        return min(dist.get_rank() * self._size(), self.parameter.ds_numel)
