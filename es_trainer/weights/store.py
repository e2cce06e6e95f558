"""The weights that are trained: flat shards of them, their float32 masters, and how a member gets in and out."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ..choices import MasterWeights
from ..noise import noise
from ..noise.shapes import Computed, Factors, Gaussian, Scattered, Sum
from .member import Member
from .pinned import PinnedMemory


MOST_FACTORS = 1 << 26  # numbers of low-rank terms, 256 MiB, that are drawn at once

WORKING_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that weights are computed with


@dataclass(frozen=True)
class Home:
    """
    Where an inference engine keeps a parameter, or this process's part of it.

    Args:
        weights (`torch.Tensor`):
            Flat view of the engine's weights.
        start (`int`, *optional*, defaults to `0`):
            Flat index of the first of them in the whole parameter.
        runs (`tuple[int, int, int]`, *optional*):
            `(offset, length, period)` of a part that is not in one piece: it has `length` weights from `offset` on of
            every `period` of the parameter, like some columns of a matrix.
        copy (`bool`, *optional*, defaults to `False`):
            Whether another process has the same part and stands for it in sums.
        shape (`torch.Size`, *optional*):
            Shape of the whole parameter, if the one that is given has no more than this part of it, flat.
    """

    weights: torch.Tensor
    start: int = 0
    runs: tuple[int, int, int] | None = None
    copy: bool = False
    shape: torch.Size | None = None

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """What lies here of a whole parameter, or of anything of its shape; flat, a view where it is in one piece."""
        return self._of(whole).reshape(-1)

    def put_into(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Write something that lies like these weights into the contiguous whole."""
        place = self._of(whole)
        place.copy_(part.view(place.shape))

    def _of(self, whole: torch.Tensor) -> torch.Tensor:
        if self.runs is None:
            return whole.reshape(-1)[self.start : self.start + self.weights.numel()]
        offset, length, period = self.runs
        return whole.reshape(-1, period)[:, offset : offset + length]


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
            Flat weights that perturbed ones are written from, or `None` where the working weights are all there is.
        dtype (`torch.dtype`):
            The working dtype: of `working`, unless that was handed out.
        start (`int`, *optional*, defaults to `0`):
            Flat index of the first element in the whole parameter.
        home ([`Home`], *optional*):
            Where an inference engine keeps the working weights.
    """

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    given: torch.dtype
    working: torch.Tensor
    master: torch.Tensor | None
    dtype: torch.dtype
    start: int = 0
    home: Home | None = None

    @property
    def is_copy(self) -> bool:
        """Whether another process has the same part and stands for it in sums."""
        return self.home is not None and self.home.copy

    @property
    def is_part(self) -> bool:
        """Whether other processes have other parts of the parameter."""
        return is_partitioned(self.parameter) or self.working.numel() < self.shape.numel()

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
        frozen (`Iterable[torch.Tensor]`, *optional*):
            The model's other parameters, and buffers. They are computed with in the working dtype, too, and never
            change; if that rounds them, the originals wait in host memory for the model to be saved. Quantized ones
            stay as they are.
        homes (`dict[nn.Parameter, Home]`, *optional*):
            Where an inference engine keeps the working weights of the parameters. They are written and read there, and
            a parameter that lies there whole becomes a view of it.
        float32 (`Collection[str]`, *optional*):
            Names of parameters that are computed with in float32 whatever `dtype` is, as the model's class wants.

    Of parameters that DeepSpeed ZeRO-3 has partitioned, or of which an engine has a part in each process, each process
    keeps, perturbs and updates its own part.

    Raises:
        `ValueError`: If a parameter to train is quantized; names it.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        dtype: torch.dtype | None = None,
        master_weights: MasterWeights = "device",
        perturbation: Gaussian | None = None,
        frozen: Iterable[torch.Tensor] = (),
        homes: dict[nn.Parameter, Home] | None = None,
        float32: Collection[str] = (),
    ):
        parameters, frozen, homes = list(parameters), list(frozen), homes or {}
        for name, parameter in parameters:
            if parameter.dtype not in WORKING_DTYPES:
                raise ValueError(
                    f"The parameter `{name}` is of {parameter.dtype}: quantized weights cannot be perturbed. Load the "
                    "model without quantization, or train an adapter on top of it with `peft_config`."
                )
        self.perturbation = perturbation or Gaussian()
        self.drifts = master_weights == "none"
        self._pinned = PinnedMemory()
        self.shards = []
        for name, parameter in parameters:
            working, home = torch.float32 if name in float32 else dtype, homes.get(parameter)
            self.shards.append(_shard(name, parameter, working, master_weights, home, self._pinned))
        self.partitioned = any(shard.is_part for shard in self.shards)
        self._frozen = [
            (parameter, _round(parameter, dtype))
            for parameter in frozen
            if dtype is not None and parameter.dtype in WORKING_DTYPES and parameter.dtype != dtype
        ]
        self._frozen_parts = [parameter for parameter in frozen if is_partitioned(parameter)]
        self.dtype = dtype
        self.handed_out = False  # whether the model's parameters hold the weights as they were given
        self._inside: tuple[Member, float] | None = None  # what the working weights hold
        # Without masters: from which weight to which it is in them, all shards counted through
        self._written = (0, 0)

    def perturb(self, member: Member, sigma: float) -> None:
        """Make the working weights those of `member`, whatever member they held before."""
        self.take_back()
        if self._inside is not None and self.drifts:
            self.restore()
        # Set before the first weight changes: if this is interrupted, there is something to restore
        self._inside = (member, sigma)
        if self.drifts:
            self._add_in_place(member.seed, sigma * member.sign)
        else:
            self._write(member.seed, sigma * member.sign)

    def restore(self) -> None:
        """Make the working weights the unperturbed ones: bit-identical with a master, up to rounding without."""
        if self._inside is None:
            return
        member, sigma = self._inside
        if self.drifts:
            self._take_out(member.seed, -sigma * member.sign)
        else:
            self.refresh()
        self._inside = None

    def _add_in_place(self, seed: int, coefficient: float) -> None:
        self._written = (0, 0)
        for stop in self._in_place(seed, coefficient, 0, self._count()):
            self._written = (0, stop)

    def _take_out(self, seed: int, coefficient: float) -> None:
        """Undo as much as was written, if that was interrupted, and no more."""
        start, stop = self._written
        for done in self._in_place(seed, coefficient, start, stop):
            self._written = (done, stop)

    def _in_place(self, seed: int, coefficient: float, start: int, stop: int) -> Iterator[int]:
        """Add noise to the weights from `start` to `stop`, all shards counted through; yields how far it has come."""
        offset = 0
        for shard in self.shards:
            terms = None
            size = shard.working.numel()
            for low in range(0, size, noise.CUDA_PIECE):
                high = min(low + noise.CUDA_PIECE, size)
                if offset + low < start or offset + high > stop:
                    continue
                terms = terms or self.terms(shard, [seed], [coefficient])
                piece = shard.working[low:high]
                before = piece.clone()
                try:
                    terms.add(piece, piece, shard.start + low)
                except BaseException:
                    piece.copy_(before)
                    raise
                yield offset + high
            offset += size

    def _count(self) -> int:
        return sum(shard.working.numel() for shard in self.shards)

    def refresh(self) -> None:
        """Round the masters to the working weights."""
        for shard in self.shards:
            if shard.master is not None:
                shard.working.copy_(shard.master)

    def _write(self, seed: int, coefficient: float) -> None:
        for shard in self.shards:
            self._write_shard(shard, shard.working, seed, coefficient)

    def _write_shard(self, shard: Shard, target: torch.Tensor, seed: int, coefficient: float) -> None:
        """Write one perturbation of a shard into a flat tensor on the device of the working weights.

        In 16 bits, nearly all of a perturbation that is smaller than the weights' last bit would be lost if it was
        rounded to nearest: it is rounded up or down at random, so that the mean is right. Without a master, the same
        rounding has to take a perturbation back, which to nearest does up to the last bit.
        """
        terms = self.terms(shard, [seed], [coefficient])
        rounding = None if self.drifts else noise.rounding_key(seed, shard.name)
        if shard.trained.device == target.device:
            terms.add(shard.trained, target, shard.start, rounding)
        else:
            _add_from_host(shard, target, terms, rounding)

    def terms(self, shard: Shard, seeds: Sequence[int], coefficients: Sequence[float]) -> Sum:
        """The sum of the seeds' perturbations of a shard, whose flat indices count from `shard.start` on."""
        terms = self.perturbation.combine(shard.name, shard.shape, seeds, coefficients, shard.working.device)
        if shard.home is not None and shard.home.runs is not None:
            return Scattered(terms, *shard.home.runs)
        return terms

    def sums(
        self, shard: Shard, seeds: Sequence[int], coefficients: Sequence[float]
    ) -> Iterator[tuple[int, int, Sum]]:
        """
        The same for a whole population, in memory that does not grow with it: of many low-rank terms, the factors are
        drawn and added up by and by. The additions are the same in the same order, so no bit of the sum is another.

        Yields:
            `tuple[int, int, Sum]`: from which index to which in the shard it is good for, and the sum.
        """
        size = shard.working.numel()
        at_once = len(seeds)
        if self.perturbation.factored(shard.shape):
            at_once = max(1, MOST_FACTORS // self.perturbation.numbers(shard.shape))
        if len(seeds) <= at_once:
            yield 0, size, self.terms(shard, seeds, coefficients)
            return
        for low in range(0, size, noise.CUDA_PIECE):
            high = min(low + noise.CUDA_PIECE, size)
            values = torch.zeros(high - low, dtype=torch.float32, device=shard.working.device)
            for first in range(0, len(seeds), at_once):
                some = slice(first, first + at_once)
                self.terms(shard, seeds[some], coefficients[some]).add(values, values, shard.start + low)
            yield low, high, Computed(values, shard.start + low)

    def of_members(self, shard: Shard, members: Sequence[Member], sigma: float) -> Factors | torch.Tensor:
        """
        The values that a parameter has in each of the members, without a change to the model.

        Returns:
            [`Factors`] to add to the working weights if the perturbation has them, or else a tensor of shape
            `(members, *parameter shape)`: of matrices in the working dtype, of vectors in float32 at least, since
            16 bits would swallow the noise of weights near 1.
        """
        working = shard.working
        seeds, coefficients = [m.seed for m in members], [sigma * m.sign for m in members]
        factors = self.perturbation.factors(
            shard.name, shard.shape, seeds, coefficients, working.device, working.dtype
        )
        if factors is not None:
            return factors
        dtype = _dtype_of_values(shard)
        values = torch.empty(len(members), working.numel(), dtype=dtype, device=working.device)
        for row, seed, coefficient in zip(values, seeds, coefficients, strict=True):
            self._write_shard(shard, row, seed, coefficient)
        return values.view(len(members), *shard.shape)

    def member_bytes(self) -> int:
        """Memory that `of_members` needs for each member."""
        return sum(self.perturbation.numbers(shard.shape) * _dtype_of_values(shard).itemsize for shard in self.shards)

    @contextlib.contextmanager
    def gathered(self, masters: bool) -> Iterator[None]:
        """
        Inside, this process has all of the parameters that DeepSpeed has partitioned, and members are written into its
        own copy.

        Args:
            masters (`bool`):
                Whether members will be written into the weights, for which those are needed in the best precision
                there is. Weights that low-rank members share are needed in the working dtype only.
        """
        if not any(is_partitioned(part.parameter) for part in self.shards):
            yield
            return
        parts, drifts = self.shards, self.drifts
        try:
            for parameter in self._frozen_parts:
                parameter.data = gather(local_part(parameter)[0], parameter).view(parameter.ds_shape)
            self.shards = [_gathered(part, masters or not self.perturbation.factored(part.shape)) for part in parts]
            self.drifts = False
            yield
        finally:
            self.shards, self.drifts, self._inside = parts, drifts, None
            for parameter in [*self._frozen_parts, *(part.parameter for part in parts)]:
                parameter.data = parameter.data.new_empty(0)

    def collect(self, keep: bool) -> dict[nn.Parameter, torch.Tensor]:
        """
        The partitioned parameters whole, in the dtype in which they were given, in host memory.

        Args:
            keep (`bool`):
                Whether this process gets them. It has to help to gather them anyhow.
        """
        originals = {parameter: original for parameter, original in self._frozen}
        collected = {}
        for part in self.shards:
            whole = _whole(part, part.trained.to(part.given))
            if keep:
                collected[part.parameter] = whole.view(part.shape).cpu()
        for parameter in self._frozen_parts:
            local, _ = local_part(parameter)
            whole = gather(originals.get(parameter, local), parameter)
            if keep:
                collected[parameter] = whole.view(parameter.ds_shape).cpu()
        return collected

    def checksums(self) -> list[int]:
        """A number for each parameter, which is another one if a bit of the trained weights is."""
        return [checksum(shard.trained, shard.start) for shard in self.shards]

    def not_finite(self) -> str | None:
        """The name of a parameter that has NaN or infinity among its weights here, or `None`."""
        for shard in self.shards:
            for weights in {id(tensor): tensor for tensor in (shard.working, shard.trained)}.values():
                if weights.numel() and not torch.linalg.vector_norm(weights, float("inf")).isfinite():
                    return shard.name
        return None

    def check(self, model: nn.Module) -> None:
        """
        Raises:
            `RuntimeError`: If `model` does not compute with these weights, so that perturbations would not reach it;
                names the parameter.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for shard in self.shards:
            whole = shard.is_part or shard.parameter.shape == shard.shape
            if parameters.get(shard.name) is not shard.parameter or not whole:
                raise RuntimeError(
                    f"The model {'has another' if shard.name in parameters else 'has no'} parameter `{shard.name}` "
                    "than when the trainer was made, so training would not reach it. Change the model "
                    "(resize_token_embeddings, adapters, torch.compile, another model) first, and make the trainer of "
                    "it then."
                )
            if not self.handed_out and not _is_working(shard):
                raise RuntimeError(
                    f"The parameter `{shard.name}` was moved, cast or replaced while the trainer works with it, so "
                    "perturbations would not reach the model. Leave out what does so (model.to(...), model.half(), "
                    "parameter.data = ...) in callbacks, reward functions and rollout functions."
                )

    # ---- the model outside of training ----

    @contextlib.contextmanager
    def at_work(self) -> Iterator[list[str]]:
        """
        Inside, the model computes with the working weights; afterwards, its parameters hold the trained weights in the
        dtype in which they were given, unless they did not before. Yields what `take_back` returned.
        """
        if not self.handed_out:
            yield []
            return
        try:
            yield self.take_back()
        finally:
            self.hand_out()

    @torch.no_grad()
    def hand_out(self) -> None:
        """
        Let the model's parameters hold the trained weights in the dtype in which they were given: what users see,
        change and save. Parts of parameters stay as they are.

        Memory: parameters that were given in float32 become their masters, and those that were given in the working
        dtype stay what they are. Others are copied, and take the place of the working weights where those follow from
        them.
        """
        if self.handed_out:
            return
        self.restore()
        for shard in self.shards:
            if shard.is_part or shard.given == shard.working.dtype:
                continue
            dtype = shard.working.dtype
            given = shard.trained.to(shard.working.device, shard.given)
            shard.parameter.data = given.view(shard.shape)
            follows = shard.master is not None or torch.promote_types(dtype, shard.given) == shard.given
            if shard.home is None and follows:
                shard.working = given
        for parameter, original in self._frozen:
            if not is_partitioned(parameter):
                parameter.data = original.to(parameter.device)
        self.handed_out = True

    @torch.no_grad()
    def take_back(self) -> list[str]:
        """
        Let the model compute with the working weights again. What was changed in its parameters meanwhile are the
        trained weights from now on.

        Returns:
            `list[str]`: names of the parameters whose values are others than before.
        """
        if not self.handed_out:
            return []
        changed = []
        for shard in self.shards:
            if shard.is_part:
                continue
            data = shard.parameter.data.reshape(-1).to(shard.trained.device)
            if not _same_memory(data, shard.trained) and not torch.equal(
                data.to(shard.given), shard.trained.to(shard.given)
            ):
                shard.trained.copy_(data)
                changed.append(shard.name)
            if shard.home is None and shard.working.dtype != shard.dtype:
                separate = shard.master is not None
                shard.working = shard.trained.to(shard.working.device, shard.dtype, copy=separate)
            elif shard.master is not None:
                shard.working.copy_(shard.master)
            shard.parameter.data = shard.working.view(shard.shape)
        self._frozen = [
            (parameter, original if is_partitioned(parameter) else _round(parameter, self.dtype))
            for parameter, original in self._frozen
        ]
        self.handed_out = False
        return changed

    @contextlib.contextmanager
    def as_given(self) -> Iterator[None]:
        """
        Inside, the model's parameters hold the trained weights in the dtype in which they were given. Partitioned ones
        hold nothing, but are of that dtype.
        """
        if self.handed_out:
            yield
            return
        self.restore()
        held = [(shard.parameter, shard.parameter.data) for shard in self.shards]
        held += [(parameter, parameter.data) for parameter, _ in self._frozen]
        for shard in self.shards:
            if shard.is_part:
                shard.parameter.data = shard.parameter.data.to(shard.given)
            elif shard.given != shard.working.dtype:
                # The master itself if it has that dtype: no copy
                shard.parameter.data = shard.trained.to(shard.given).view(shard.shape)
        for parameter, original in self._frozen:
            parameter.data = parameter.data.to(original.dtype) if is_partitioned(parameter) else original
        try:
            yield
        finally:
            for parameter, data in held:
                parameter.data = data

    def adopt(self) -> None:
        """Take what has been loaded into the model's parameters, inside `as_given`, as the trained weights."""
        for shard in self.shards:
            loaded = shard.parameter.data.reshape(-1)
            shard.trained.copy_(loaded)
            shard.working.copy_(loaded)


# Odd, and without a pattern: the 64 bits of the golden ratio, and a multiplier of SplitMix64
MULTIPLIER_0, MULTIPLIER_1 = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: torch.Tensor, start: int = 0) -> int:
    """
    A 64-bit number that another one takes the place of if a bit or the order of the values is another.

    It is the sum, modulo 2**64, of the values' bits times odd multipliers that are hashes of their indices. So the
    checksums of a tensor's slices add up to its own, and neither the size of pieces nor the device count.

    Args:
        values (`torch.Tensor`):
            Flat tensor.
        start (`int`, *optional*, defaults to `0`):
            Flat index of the first of them.
    """

    def piece(low: int, high: int) -> int:
        index = torch.arange(start + low, start + high, dtype=torch.int64, device=values.device)
        index.mul_(MULTIPLIER_0)
        index.bitwise_xor_(index >> 32).mul_(MULTIPLIER_1).bitwise_or_(1)
        return index.mul_(values[low:high].view(BITS[values.itemsize])).sum().item()

    return sum(noise.for_pieces(piece, values.numel(), values.device)) % (1 << 64)


def _is_working(shard: Shard) -> bool:
    """Whether the parameter's data are the working weights."""
    if is_partitioned(shard.parameter):
        return _same_memory(local_part(shard.parameter)[0], shard.working)
    if shard.is_part:
        return True  # the engine computes with them, and the parameter has nothing
    return _same_memory(shard.parameter.data, shard.working)


def _same_memory(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (mine.data_ptr(), mine.dtype, mine.device) == (theirs.data_ptr(), theirs.dtype, theirs.device)


def _dtype_of_values(shard: Shard) -> torch.dtype:
    """Of what many members have of a parameter at once."""
    dtype = shard.working.dtype
    return torch.promote_types(dtype, torch.float32) if len(shard.shape) < 2 else dtype


def _add_from_host(shard: Shard, target: torch.Tensor, terms: Sum, rounding: int | None) -> None:
    def piece(low: int, high: int) -> None:
        source = shard.master[low:high].to(target.device, non_blocking=True)
        terms.add(source, target[low:high], shard.start + low, rounding)

    noise.for_pieces(piece, target.numel(), target.device)


# ---- parameters of which each process has a part ----


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed ZeRO-3 has partitioned the parameter."""
    return hasattr(parameter, "ds_tensor")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's shape, whether it is partitioned or not."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def local_part(parameter: nn.Parameter) -> tuple[torch.Tensor, int]:
    """Flat view of this process's part of a parameter, and where in the whole it begins."""
    if not is_partitioned(parameter):
        return parameter.data.view(-1), 0
    # Parts are of equal size: what is behind the end of the parameter is padding
    part = parameter.ds_tensor.data
    start = min(dist.get_rank() * part.numel(), parameter.ds_numel)
    return part[: parameter.ds_numel - start], start


def gather(local: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """All of something that lies in the processes like a partitioned parameter, flat, on the device of the model."""
    size = parameter.ds_tensor.numel()
    local = F.pad(local.to(parameter.device), (0, size - local.numel()))
    whole = local.new_empty(size * dist.get_world_size())
    # Its name before torch 2.13, which warns of it
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(whole, local)
    return whole[: parameter.ds_numel]


def _whole(part: Shard, values: torch.Tensor) -> torch.Tensor:
    """All of something that lies in the processes like a parameter of which this one has a part."""
    if is_partitioned(part.parameter):
        return gather(values, part.parameter)
    if not part.is_part:
        return values
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, None if part.is_copy else (part.home.start, part.home.runs, values.cpu()))
    whole = values.new_empty(part.shape.numel(), device="cpu")
    for start, runs, piece in filter(None, parts):
        Home(piece, start, runs).put_into(whole, piece)
    return whole


def _gathered(part: Shard, master: bool) -> Shard:
    if master:
        whole = gather(part.trained, part.parameter)
        working = whole.to(part.working.dtype, copy=True)
    else:
        whole = None
        working = gather(part.working, part.parameter)
    part.parameter.data = working.view(part.shape)
    return Shard(part.name, part.parameter, part.shape, part.given, working, whole, part.dtype)


# ---- dtypes and masters ----


def _cast(parameter: torch.Tensor, dtype: torch.dtype) -> None:
    parameter.data = parameter.data.to(dtype).contiguous()
    if is_partitioned(parameter):
        parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtype)


def _round(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Make the parameter's data one of `dtype` and return the original."""
    original = local_part(parameter)[0].cpu() if is_partitioned(parameter) else parameter.data.cpu()
    _cast(parameter, dtype)
    return original


def _shard(
    name: str,
    parameter: nn.Parameter,
    dtype: torch.dtype | None,
    master_weights: MasterWeights,
    home: Home | None,
    pinned: PinnedMemory,
) -> Shard:
    shape = whole_shape(parameter)
    if home is not None:
        if home.shape is None:
            given = home.part_of(parameter.data)
        else:
            shape, given = home.shape, parameter.data
        start, working = home.start, home.weights
        parameter.data = working.view(shape) if working.numel() == shape.numel() else working.new_empty(0)
    else:
        parameter.data = parameter.data.contiguous()
        given, start = local_part(parameter)
        _cast(parameter, dtype or given.dtype)
        working, _ = local_part(parameter)
    if master_weights == "none":
        master = None
    elif master_weights == "host":
        if working.device.type == "cuda":
            master = pinned.empty(given.shape)
        else:
            master = torch.empty(given.shape, dtype=torch.float32, device="cpu")
        master.copy_(given)
    else:
        # Nothing is copied if the model computes in another dtype than float32
        master = given.to(working.device, torch.float32, copy=given.data_ptr() == working.data_ptr())
    return Shard(name, parameter, shape, given.dtype, working, master, working.dtype, start, home)
