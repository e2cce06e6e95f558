"""Which weights of a parameter a process has."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """
    A strided slice of a named parameter: `length` weights from `offset` on of every `period` of the flat parameter.

    Some columns of a matrix are such a slice, with the number of all columns as the period. A contiguous piece is one
    with a period as long as the parameter.

    Args:
        name (`str`):
            Name of the parameter; keys its noise.
        shape (`torch.Size`):
            Shape of the whole parameter.
        offset (`int`):
            Index of the first weight of the slice within a period.
        length (`int`):
            Number of the weights of the slice in each period.
        period (`int`):
            Number of weights of the parameter from the start of a run to the start of the next. It divides the number
            of all weights.
        replica (`bool`, *optional*, defaults to `False`):
            Whether another process has the same weights and stands for them in sums.
    """

    name: str
    shape: torch.Size
    offset: int
    length: int
    period: int
    replica: bool = False

    @classmethod
    def piece(cls, name: str, shape: Sequence[int], start: int, numel: int, replica: bool = False) -> "Part":
        """`numel` weights from flat index `start` on."""
        shape = torch.Size(shape)
        return cls(name, shape, start, numel, max(1, shape.numel()), replica)

    @classmethod
    def whole(cls, name: str, shape: Sequence[int], replica: bool = False) -> "Part":
        """All of a parameter."""
        return cls.piece(name, shape, 0, torch.Size(shape).numel(), replica)

    @property
    def numel(self) -> int:
        """Number of weights of the slice."""
        return self.shape.numel() // self.period * self.length

    @property
    def is_whole(self) -> bool:
        """Whether the slice is all of the parameter."""
        return self.numel == self.shape.numel()

    @property
    def is_contiguous(self) -> bool:
        """Whether the slice is one piece of the flat parameter."""
        return self.period >= self.shape.numel()

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The slice of a whole parameter, or of anything of its shape; flat, a view where it is contiguous."""
        return whole.reshape(-1, self.period)[:, self.offset : self.offset + self.length].reshape(-1)

    def piece_of(self, whole: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The weights `start` to `stop` of the slice of a whole parameter, without all of the slice in memory."""
        first, last = start // self.length, -(-stop // self.length)  # periods
        rows = whole.reshape(-1, self.period)[first:last, self.offset : self.offset + self.length]
        return rows.reshape(-1)[start - first * self.length : stop - first * self.length]

    def put_into(self, whole: torch.Tensor, values: torch.Tensor) -> None:
        """Write the flat values of the slice into a contiguous whole."""
        slices = whole.view(-1, self.period)[:, self.offset : self.offset + self.length]
        slices.copy_(values.view(slices.shape))

    def sample(self, stride: int) -> tuple[slice | torch.Tensor, slice | torch.Tensor]:
        """
        Of a sample of the parameter, which is every `stride`-th of its weights from the first on: which weights of the
        slice are in it, and which of the sample those are.
        """
        if self.is_contiguous:
            first, stop = -(-self.offset // stride), -(-(self.offset + self.length) // stride)
            return slice(-self.offset % stride, None, stride), slice(first, stop)
        index = torch.arange(0, self.shape.numel(), stride, device="cpu")
        column = index % self.period - self.offset
        (own,) = ((column >= 0) & (column < self.length)).nonzero(as_tuple=True)
        return index[own] // self.period * self.length + column[own], own
