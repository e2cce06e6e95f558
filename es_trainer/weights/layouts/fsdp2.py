"""Parameters that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded: each process has some of their rows."""

import torch
from torch.distributed.tensor import DTensor, Shard

from ..part import Part
from .layout import Layout, same_memory


class FSDP2(Layout):
    """
    The working weights are this process's shard of the parameter, in the memory that FSDP2 gathers from for forward
    passes. Whoever evaluates or changes them has all modules resharded before (`FSDPModule.reshard`).
    """

    in_place = True
    in_parameter = False
    parameter: DTensor

    def __init__(self, parameter: DTensor):
        super().__init__(parameter)
        if parameter.placements != (Shard(0),):
            raise ValueError(
                f"A parameter is placed as {parameter.placements}, but must be sharded by its rows over all "
                "processes: give `fully_shard` a mesh of one dimension, and leave tensor parallelism out."
            )

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    def part(self, name: str) -> Part:
        mesh = self.parameter.device_mesh
        rows = -(-self.shape[0] // mesh.size())  # of each process but the last ones
        first = min(rows * mesh.get_local_rank(), self.shape[0])
        return Part.piece(name, self.shape, first * self.shape[1:].numel(), self.working().numel())

    def original(self) -> torch.Tensor:
        return self.working()

    def working(self) -> torch.Tensor:
        return self.parameter.to_local().detach().view(-1)

    def cast(self, dtype: torch.dtype) -> None:
        """
        Raises:
            `ValueError`: If the dtype is another: FSDP2 keeps the memory of the shards.
        """
        if dtype != self.parameter.dtype:
            raise ValueError(
                f"The model was sharded in {self.parameter.dtype}, but is to be computed with in {dtype}. Call "
                f"`model.to({dtype})` before `fully_shard`."
            )

    def computes_with(self, working: torch.Tensor) -> bool:
        return same_memory(self.working(), working)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        sharded = self.parameter
        local = values.to(sharded.device).view(sharded.to_local().shape)
        whole = DTensor.from_local(
            local, sharded.device_mesh, sharded.placements, shape=sharded.shape, stride=sharded.stride()
        )
        return whole.full_tensor().view(-1)
