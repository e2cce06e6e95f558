"""What there is to know of the place of a parameter's weights."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch

from ..part import Part


class Layout(ABC):
    """
    Where the weights of a parameter are that the model computes with, and which part of them this process has.

    Args:
        parameter (`torch.Tensor`):
            The model's parameter or buffer.
    """

    in_place = False  # whether the working weights must stay in the memory where they are
    quantized = False  # whether the working weights are stored in fewer bits than they are computed with

    def __init__(self, parameter: torch.Tensor):
        self.parameter = parameter

    @property
    @abstractmethod
    def in_parameter(self) -> bool:
        """Whether the parameter's data are all of its weights."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the whole parameter."""

    @property
    def computed(self) -> torch.Tensor:
        """What modules compute with, of the parameter's shape."""
        return self.parameter.data

    @abstractmethod
    def part(self, name: str) -> Part:
        """Which weights of the parameter this process has."""

    @abstractmethod
    def original(self) -> torch.Tensor:
        """The part's weights in the checkpoint's dtype, flat, before the first cast."""

    @abstractmethod
    def working(self) -> torch.Tensor:
        """Flat view of the part's weights that the model computes with."""

    @abstractmethod
    def cast(self, dtype: torch.dtype) -> None:
        """Make the model compute with weights of a dtype."""

    @contextlib.contextmanager
    def rewritten(self, working: torch.Tensor) -> Iterator[torch.Tensor]:
        """
        Inside, flat weights to write all of the part's new values into; afterwards, the model computes with these.
        """
        yield working

    @abstractmethod
    def computes_with(self, working: torch.Tensor) -> bool:
        """Whether these are the weights that the model computes with."""

    @abstractmethod
    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """All of something of which each process has its part, flat. All processes call it together."""

    def hold(self, whole: torch.Tensor) -> None:
        """Let the parameter's data be all of its weights."""
        self.parameter.data = whole.view(self.shape)

    def release(self) -> None:
        """Let the parameter's data be empty."""
        self.parameter.data = self.parameter.data.new_empty(0)


def same_memory(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors begin at the same address and are of the same dtype."""
    return (mine.data_ptr(), mine.dtype, mine.device) == (theirs.data_ptr(), theirs.dtype, theirs.device)
