"""The weights that are trained: flat shards of them, their float32 masters, and how a member gets in and out."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from . import noise
from .perturbation import Factors, Gaussian, Noises, Products
from .population import Member


MasterWeights = Literal["device", "host", "none"]


@dataclass
class Shard:
    """
    This process's part of one parameter.

    Args:
        name (`str`):
            Name of the parameter; keys its noise.
        parameter (`nn.Parameter`):
            The parameter that the model computes with.
        shape (`torch.Size`):
            Shape of the whole parameter.
        given (`torch.dtype`):
            The dtype that the parameter had when it was given, and that it is saved in.
        working (`torch.Tensor`):
            Flat view of the weights that the model computes with.
        master (`torch.Tensor` or `None`):
            Flat float32 weights, or `None` where the working weights are all there is.
        start (`int`, *optional*, defaults to `0`):
            Flat index of the first element in the whole parameter.
    """

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    given: torch.dtype
    working: torch.Tensor
    master: torch.Tensor | None
    start: int = 0

    @property
    def trained(self) -> torch.Tensor:
        """The unperturbed weights in the best precision there is."""
        return self.working if self.master is None else self.master


class Weights:
    """
    The trained weights of a model, into which one member at a time is written.

    Args:
        parameters (`Iterable[tuple[str, nn.Parameter]]`):
            Named parameters to train. Their data is replaced by tensors of the working dtype.
        dtype (`torch.dtype`, *optional*):
            Dtype of the working weights. `None` keeps each parameter's.
        master_weights (`str`, *optional*, defaults to `"device"`):
            - `"device"`: float32 masters beside the working weights. A member is written from the master, so that
              nothing is left of it when the next is written: no drift, and no update is too small for bfloat16.
            - `"host"`: the same in host memory, pinned if the weights are on an accelerator.
            - `"none"`: add the noise and subtract it again in place, as the code of arXiv 2509.24372 does. Least
              memory; each evaluation leaves a rounding error behind.
        perturbation ([`Gaussian`], *optional*):
            Shape of the noise.
        frozen (`Iterable[nn.Parameter]`, *optional*):
            The model's other parameters. They are computed with in the working dtype, too, and never change; if that
            rounds them, the originals wait in host memory for the model to be saved.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        dtype: torch.dtype | None = None,
        master_weights: MasterWeights = "device",
        perturbation: Gaussian | None = None,
        frozen: Iterable[nn.Parameter] = (),
    ):
        self.perturbation = perturbation or Gaussian()
        self.drifts = master_weights == "none"
        self.shards = [_shard(name, parameter, dtype, master_weights) for name, parameter in parameters]
        self._frozen = [
            (parameter, _round(parameter, dtype))
            for parameter in frozen
            if dtype is not None and parameter.is_floating_point() and parameter.dtype != dtype
        ]
        self._inside: tuple[Member, float] | None = None  # what the working weights hold

    def perturb(self, member: Member, sigma: float) -> None:
        """Make the working weights those of `member`, whatever member they held before."""
        if self._inside is not None and self.drifts:
            self.restore()
        # Set before the first weight changes: if this is interrupted, there is something to restore
        self._inside = (member, sigma)
        self._write(member.seed, sigma * member.sign)

    def restore(self) -> None:
        """Make the working weights the unperturbed ones: bit-identical with a master, up to rounding without."""
        if self._inside is None:
            return
        member, sigma = self._inside
        if self.drifts:
            self._write(member.seed, -sigma * member.sign)
        else:
            self.refresh()
        self._inside = None

    def refresh(self) -> None:
        """Round the masters to the working weights."""
        for shard in self.shards:
            if shard.master is not None:
                shard.working.copy_(shard.master)

    def _write(self, seed: int, coefficient: float) -> None:
        for shard in self.shards:
            self._write_shard(shard, shard.working, seed, coefficient)

    def _write_shard(self, shard: Shard, target: torch.Tensor, seed: int, coefficient: float) -> None:
        """Write one perturbation of a shard into a flat tensor on the device of the working weights."""
        terms = self.perturbation.combine(shard.name, shard.shape, [seed], [coefficient], target.device)
        if shard.trained.device == target.device:
            terms.add(shard.trained, target, shard.start)
        else:
            _add_from_host(shard, target, terms)

    def of_members(self, shard: Shard, members: Sequence[Member], sigma: float) -> Factors | torch.Tensor:
        """
        The values that a parameter has in each of the members, without a change to the model.

        Returns:
            [`Factors`] to add to the working weights if the perturbation has them, or else a tensor of shape
            `(members, *parameter shape)` in the working dtype.
        """
        working = shard.working
        seeds, coefficients = [m.seed for m in members], [sigma * m.sign for m in members]
        factors = self.perturbation.factors(
            shard.name, shard.shape, seeds, coefficients, working.device, working.dtype
        )
        if factors is not None:
            return factors
        values = torch.empty(len(members), working.numel(), dtype=working.dtype, device=working.device)
        for row, seed, coefficient in zip(values, seeds, coefficients, strict=True):
            self._write_shard(shard, row, seed, coefficient)
        return values.view(len(members), *shard.shape)

    def member_bytes(self) -> int:
        """Memory that `of_members` needs for each member."""
        return sum(self.perturbation.numbers(shard.shape) * shard.working.itemsize for shard in self.shards)

    @contextlib.contextmanager
    def as_given(self) -> Iterator[None]:
        """Inside, the model's parameters hold the trained weights in the dtype in which they were given."""
        for shard in self.shards:
            if shard.given != shard.working.dtype:
                # The master itself if it has that dtype: no copy
                shard.parameter.data = shard.trained.to(shard.given).view(shard.parameter.shape)
        rounded = [parameter.data for parameter, _ in self._frozen]
        for parameter, original in self._frozen:
            parameter.data = original
        try:
            yield
        finally:
            for shard in self.shards:
                shard.parameter.data = shard.working.view(shard.parameter.shape)
            for (parameter, _), data in zip(self._frozen, rounded, strict=True):
                parameter.data = data

    def adopt(self) -> None:
        """Take what has been loaded into the model's parameters, inside `as_given`, as the trained weights."""
        for shard in self.shards:
            loaded = shard.parameter.data.reshape(-1)
            shard.trained.copy_(loaded)
            shard.working.copy_(loaded)


def _add_from_host(shard: Shard, target: torch.Tensor, terms: Noises | Products) -> None:
    def piece(low: int, high: int) -> None:
        source = shard.master[low:high].to(target.device, non_blocking=True)
        terms.add(source, target[low:high], shard.start + low)

    noise.for_pieces(piece, target.numel(), target.device)


def _round(parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    """Make the parameter's data one of `dtype` and return the original."""
    original = parameter.data.cpu()
    parameter.data = parameter.data.to(dtype)
    return original


def _shard(name: str, parameter: nn.Parameter, dtype: torch.dtype | None, master_weights: MasterWeights) -> Shard:
    given = parameter.data.contiguous().view(-1)
    working = given.to(dtype or given.dtype)
    if master_weights == "none":
        master = None
    elif master_weights == "host":
        master = torch.empty(given.shape, dtype=torch.float32, pin_memory=given.device.type == "cuda").copy_(given)
    else:
        master = given.to(torch.float32)
        if master.data_ptr() == working.data_ptr():
            working = working.clone()
    parameter.data = working.view(parameter.shape)
    return Shard(name, parameter, parameter.shape, given.dtype, working, master)
