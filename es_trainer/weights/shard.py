"""What a process has of one parameter that is trained."""

import contextlib
from dataclasses import dataclass

import torch

from .layouts import Layout
from .part import Part


@dataclass
class Shard:
    """
    This process's part of one parameter: the working weights and their master.

    Args:
        part ([`Part`]):
            Which weights of the parameter they are.
        layout ([`Layout`]):
            Where they lie.
        checkpoint_dtype (`torch.dtype`):
            The dtype that the parameter had when it was given, and that it is saved in.
        working (`torch.Tensor`):
            Flat view of the weights that the model computes with, or those themselves where they are quantized.
        master (`torch.Tensor` or `None`):
            Flat float32 weights that perturbed ones are written from, or `None` where the working weights are all
            there is.
        dtype (`torch.dtype`):
            The working dtype: of `working`, unless the model's parameters hold the weights as they were given.
    """

    part: Part
    layout: Layout
    checkpoint_dtype: torch.dtype
    working: torch.Tensor
    master: torch.Tensor | None
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return self.part.name

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole parameter."""
        return self.part.shape

    @property
    def parameter(self) -> torch.Tensor:
        """The parameter that the model computes with."""
        return self.layout.parameter

    @property
    def trained(self) -> torch.Tensor:
        """The unperturbed weights in the best precision there is."""
        return self.working if self.master is None else self.master

    def rewritten(self) -> contextlib.AbstractContextManager[torch.Tensor]:
        """
        Inside, flat weights to write all new working weights into; afterwards, the model computes with these. They
        have no values yet where the working weights are stored in another way.
        """
        return self.layout.rewritten(self.working)
