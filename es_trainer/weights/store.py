"""The weights that are trained, into which one member at a time is written."""

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from ..choices import MasterWeights
from ..noise import noise
from ..noise.shapes import Factors, Gaussian, PrecomputedSum, StridedSum, Sum
from .checksum import checksum_of_part
from .frozen import WORKING_DTYPES, FrozenTensors
from .in_place import InPlace
from .layouts import EngineWeights, Layout, Quantized, Whole, layout_of
from .layouts.layout import same_memory
from .masters import make_master
from .member import Member
from .part import Part
from .pinned import PinnedMemory
from .rounding import write_rounded
from .scalars import to_host
from .shard import Shard


MOST_FACTORS = 1 << 26  # numbers of low-rank terms, 256 MiB, that are drawn at once


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
        engine_weights (`dict[nn.Parameter, EngineWeights]`, *optional*):
            The weights that an inference engine has of the parameters. They become the working weights, which are
            written and read where they are; a parameter that the engine has whole becomes a view of them.
        float32 (`Collection[str]`, *optional*):
            Names of parameters that are computed with in float32 whatever `dtype` is, as the model's class wants.
        quantized (`Mapping[nn.Parameter, Quantized]`, *optional*):
            The layouts of parameters that are computed with from 8 bits. They need masters.

    Of parameters that DeepSpeed ZeRO-3 or FSDP2 has partitioned, or of which an engine has a part in each process,
    each process keeps, perturbs and updates its own part.

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
        engine_weights: dict[nn.Parameter, EngineWeights] | None = None,
        float32: Collection[str] = (),
        quantized: Mapping[nn.Parameter, Quantized] | None = None,
    ):
        parameters, engine_weights, quantized = list(parameters), engine_weights or {}, quantized or {}
        for name, parameter in parameters:
            if parameter.dtype not in WORKING_DTYPES:
                raise ValueError(
                    f"The parameter `{name}` is of {parameter.dtype}: quantized weights cannot be perturbed. Load the "
                    "model without quantization, or train an adapter on top of it with `peft_config`."
                )
        self.perturbation = perturbation or Gaussian()
        self.drifts = master_weights == "none"
        self.dtype = dtype
        self.has_checkpoint_dtype = False  # whether the model's parameters hold the weights as they were given
        self._master_weights = master_weights
        self._pinned = PinnedMemory()
        self.shards = [
            self._make_shard(
                name,
                quantized.get(parameter) or layout_of(parameter, engine_weights.get(parameter)),
                torch.float32 if name in float32 else dtype,
            )
            for name, parameter in parameters
        ]
        self.partitioned = not all(shard.layout.in_parameter or shard.layout.quantized for shard in self.shards)
        self._frozen = FrozenTensors(frozen, dtype)
        self._inside: tuple[Member, float] | None = None  # what the working weights hold
        self._in_place = InPlace()

    def _make_shard(self, name: str, layout: Layout, dtype: torch.dtype | None) -> Shard:
        part, original = layout.part(name), layout.original()
        layout.cast(dtype or original.dtype)
        working = layout.working()
        master = make_master(original, working, self._master_weights, self._pinned)
        return Shard(part, layout, original.dtype, working, master, working.dtype)

    def perturb(self, member: Member, sigma: float) -> None:
        """Make the working weights those of `member`, whatever member they held before; of a center, as `restore`."""
        self.to_working_dtype()
        if member.is_center:
            self.restore()
            return
        if self._inside is not None and self.drifts:
            self.restore()
        # Set before the first weight changes: if this is interrupted, there is something to restore
        self._inside = (member, sigma)
        if self.drifts:
            self._in_place.add(self.shards, lambda shard: self._perturbation(shard, member.seed, sigma * member.sign))
        else:
            for shards in self._batches():
                sums = self._weighted_sum_of_each(shards, [member.seed], [sigma * member.sign])
                writes = []
                for shard, own in zip(shards, sums, strict=True):
                    if shard.layout.quantized:
                        shard.working.added = own
                    else:
                        writes.append((shard, shard.working, own, self._rounding(shard, member.seed)))
                write_rounded(writes)

    def restore(self) -> None:
        """Make the working weights the unperturbed ones: bit-identical with a master, up to rounding without."""
        if self._inside is None:
            return
        member, sigma = self._inside
        if self.drifts:
            self._in_place.undo(
                self.shards, lambda shard: self._perturbation(shard, member.seed, -sigma * member.sign)
            )
        else:
            self.refresh()
        self._inside = None

    def refresh(self) -> None:
        """Round the masters to the working weights."""
        for shard in self.shards:
            if shard.master is not None:
                shard.working.copy_(shard.master)

    def _batches(self, members: int = 1) -> Iterator[list[Shard]]:
        """Shards whose perturbations are drawn together: on one device, and with memory for the factors."""
        batch: list[Shard] = []
        drawn = 0
        for shard in self.shards:
            factored = self.perturbation.factored(shard.shape)
            numbers = members * self.perturbation.numbers(shard.shape) if factored else 0
            if batch and (drawn + numbers > MOST_FACTORS or shard.working.device != batch[0].working.device):
                yield batch
                batch, drawn = [], 0
            batch.append(shard)
            drawn += numbers
        if batch:
            yield batch

    def _rounding(self, shard: Shard, seed: int) -> int | None:
        # Without a master, the same rounding has to take a perturbation back, which to nearest does up to the last bit
        return None if self.drifts else noise.rounding_key(seed, shard.name)

    def _perturbation(self, shard: Shard, seed: int, coefficient: float) -> Sum:
        return self.weighted_sum(shard, [seed], [coefficient])

    def weighted_sum(self, shard: Shard, seeds: Sequence[int], coefficients: Sequence[float]) -> Sum:
        """The sum of the seeds' perturbations of a shard, whose indices count from the start of the shard on."""
        (found,) = self._weighted_sum_of_each([shard], seeds, coefficients)
        return found

    def _weighted_sum_of_each(
        self, shards: list[Shard], seeds: Sequence[int], coefficients: Sequence[float]
    ) -> list[Sum]:
        parameters = [(shard.name, shard.shape) for shard in shards]
        wholes = self.perturbation.combine_each(parameters, seeds, coefficients, shards[0].working.device)
        parts = [shard.part for shard in shards]
        return [
            whole if part.is_whole else StridedSum(whole, part.offset, part.length, part.period)
            for whole, part in zip(wholes, parts, strict=True)
        ]

    def weighted_sums(
        self, shard: Shard, seeds: Sequence[int], coefficients: Sequence[float]
    ) -> Iterator[tuple[int, int, Sum]]:
        """
        The same for a whole population, in memory that does not grow with it: of many low-rank terms, the factors are
        drawn and added up by and by. The additions are the same in the same order, so no bit of the sum is another.

        Yields:
            `tuple[int, int, Sum]`: from which index to which in the shard it is good for, and the sum.
        """
        size = shard.part.numel
        at_once = len(seeds)
        if self.perturbation.factored(shard.shape):
            at_once = max(1, MOST_FACTORS // self.perturbation.numbers(shard.shape))
        if len(seeds) <= at_once:
            yield 0, size, self.weighted_sum(shard, seeds, coefficients)
            return
        for low in range(0, size, noise.CUDA_PIECE):
            high = min(low + noise.CUDA_PIECE, size)
            values = torch.zeros(high - low, dtype=torch.float32, device=shard.working.device)
            for first in range(0, len(seeds), at_once):
                some = slice(first, first + at_once)
                self.weighted_sum(shard, seeds[some], coefficients[some]).add(values, values, low)
            yield low, high, PrecomputedSum(values, low)

    def of_members(
        self, shard: Shard, members: Sequence[Member], sigma: float, dtype: torch.dtype | None = None
    ) -> Factors | torch.Tensor:
        """
        The values that a parameter has in each of the members, without a change to the model.

        Args:
            shard ([`Shard`]):
                The parameter.
            members (`Sequence[Member]`):
                The members.
            sigma (`float`):
                Standard deviation of the perturbations.
            dtype (`torch.dtype`, *optional*):
                Dtype of what is returned. If `None`, of matrices the working dtype, and of vectors float32 at least,
                since 16 bits would swallow the noise of weights near 1.

        Returns:
            [`Factors`] to add to the working weights if the perturbation has them, or else a tensor of shape
            `(members, *parameter shape)`.
        """
        (values,) = self._of_members([shard], members, sigma, dtype)
        return values

    def all_of_members(
        self, members: Sequence[Member], sigma: float
    ) -> Iterator[tuple[Shard, Factors | torch.Tensor]]:
        """The same for all parameters, one after another. On a GPU, what many of them need is drawn in one launch."""
        for shards in self._batches(len(members)):
            yield from zip(shards, self._of_members(shards, members, sigma), strict=True)

    def _of_members(
        self, shards: list[Shard], members: Sequence[Member], sigma: float, dtype: torch.dtype | None = None
    ) -> list[Factors | torch.Tensor]:
        seeds, coefficients = [m.seed for m in members], [sigma * m.sign for m in members]
        parameters = [(shard.name, shard.shape) for shard in shards]
        factors = self.perturbation.factors_each(parameters, seeds, coefficients, shards[0].working.device)
        found: list[Factors | torch.Tensor] = []
        writes: list[tuple[Shard, torch.Tensor, Sum, int | None]] = []
        for shard, own in zip(shards, factors, strict=True):
            if own is not None:
                found.append(own.to(dtype or shard.working.dtype))
            else:
                values, own_writes = self._values(shard, members, sigma, dtype)
                found.append(values)
                writes += own_writes
        write_rounded(writes)
        return found

    def values_of_members(
        self, shard: Shard, members: Sequence[Member], sigma: float, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """As `of_members`, but values whatever the perturbation: a tensor of shape `(members, *parameter shape)`."""
        values, writes = self._values(shard, members, sigma, dtype)
        write_rounded(writes)
        return values

    def _values(
        self, shard: Shard, members: Sequence[Member], sigma: float, dtype: torch.dtype | None
    ) -> tuple[torch.Tensor, list[tuple[Shard, torch.Tensor, Sum, int | None]]]:
        """The place of the values that members have of a parameter, and what is to be written there."""
        values = shard.working.new_empty(len(members), shard.part.numel, dtype=dtype or _dtype_of_values(shard))
        writes: list[tuple[Shard, torch.Tensor, Sum, int | None]] = []
        for row, member in zip(values, members, strict=True):
            if member.is_center:
                row.copy_(shard.working)
            else:
                key = self._rounding(shard, member.seed)
                writes.append((shard, row, self._perturbation(shard, member.seed, sigma * member.sign), key))
        return values.view(len(members), *shard.shape), writes

    def member_bytes(self) -> int:
        """Memory that `of_members` needs for each member."""
        return sum(self.perturbation.numbers(shard.shape) * _dtype_of_values(shard).itemsize for shard in self.shards)

    @contextlib.contextmanager
    def gathered(self, for_members: bool, masters: bool) -> Iterator[None]:
        """
        Inside, this process has all of the parameters that DeepSpeed has partitioned, and members are written into its
        own copy.

        Args:
            for_members (`bool`):
                Whether members will be evaluated. If not, the working weights are all that is needed.
            masters (`bool`):
                Whether members will be written into the weights, for which those are needed in the best precision
                there is. Weights that low-rank members share are needed in the working dtype only.
        """
        if not self.partitioned:
            yield
            return
        parts, drifts = self.shards, self.drifts
        try:
            self._frozen.hold()
            self.shards = [
                _gathered(part, for_members and (masters or not self.perturbation.factored(part.shape)))
                for part in parts
            ]
            self.drifts = False
            yield
        finally:
            self.shards, self.drifts, self._inside = parts, drifts, None
            self._frozen.release()
            for part in parts:
                part.layout.release()

    def collect(self, keep: bool) -> dict[torch.Tensor, torch.Tensor]:
        """
        The partitioned parameters whole, in the dtype in which they were given, in host memory.

        Args:
            keep (`bool`):
                Whether this process gets them. It has to help to gather them anyhow.
        """
        collected = {}
        for shard in self.shards:
            whole = shard.layout.gather(shard.trained.to(shard.checkpoint_dtype))
            if keep:
                collected[shard.parameter] = whole.view(shard.shape).cpu()
        for tensor, whole in self._frozen.collect():
            if keep:
                collected[tensor] = whole.cpu()
        return collected

    def checksums(self) -> list[int]:
        """A number for each parameter, which is another one if a bit of the trained weights is."""
        return [checksum_of_part(shard.part, shard.trained) for shard in self.shards]

    def not_finite(self) -> str | None:
        """The name of a parameter that has NaN or infinity among its weights here, or `None`."""
        found = [
            (shard.name, torch.linalg.vector_norm(weights, float("inf")))
            for shard in self.shards
            for weights in {id(tensor): tensor for tensor in (shard.working, shard.trained)}.values()
            if weights.numel()
        ]
        largest = to_host([norm for _, norm in found])
        return next((name for (name, _), norm in zip(found, largest, strict=True) if not math.isfinite(norm)), None)

    def check(self, model: nn.Module) -> None:
        """
        Raises:
            `RuntimeError`: If `model` does not compute with these weights, so that perturbations would not reach it;
                names the parameter.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for shard in self.shards:
            resized = shard.layout.in_parameter and shard.parameter.shape != shard.shape
            if parameters.get(shard.name) is not shard.parameter or resized:
                raise RuntimeError(
                    f"The model {'has another' if shard.name in parameters else 'has no'} parameter `{shard.name}` "
                    "than when the trainer was made, so training would not reach it. Change the model "
                    "(resize_token_embeddings, adapters, torch.compile, another model) first, and make the trainer of "
                    "it then."
                )
            if not self.has_checkpoint_dtype and not shard.layout.computes_with(shard.working):
                raise RuntimeError(
                    f"The parameter `{shard.name}` was moved, cast or replaced while the trainer works with it, so "
                    "perturbations would not reach the model. Leave out what does so (model.to(...), model.half(), "
                    "parameter.data = ...) in callbacks, reward functions and rollout functions."
                )

    # ---- the model outside of training ----

    @contextlib.contextmanager
    def in_working_dtype(self) -> Iterator[list[str]]:
        """
        Inside, the model computes with the working weights; afterwards, its parameters hold the trained weights in the
        dtype in which they were given, unless they did not before. Yields what `to_working_dtype` returned.
        """
        if not self.has_checkpoint_dtype:
            yield []
            return
        try:
            yield self.to_working_dtype()
        finally:
            self.to_checkpoint_dtype()

    @torch.no_grad()
    def to_checkpoint_dtype(self) -> None:
        """
        Let the model's parameters hold the trained weights in the dtype in which they were given: what users see,
        change and save. Parts of parameters stay as they are.

        Memory: parameters that were given in float32 become their masters, and those that were given in the working
        dtype stay what they are. Others are copied, and take the place of the working weights where those follow from
        them.
        """
        if self.has_checkpoint_dtype:
            return
        self.restore()
        for shard in self.shards:
            if not shard.layout.in_parameter or shard.checkpoint_dtype == shard.working.dtype:
                continue
            dtype = shard.working.dtype
            original = shard.trained.to(shard.working.device, shard.checkpoint_dtype)
            shard.parameter.data = original.view(shard.shape)
            exact = torch.promote_types(dtype, shard.checkpoint_dtype) == shard.checkpoint_dtype
            if not shard.layout.in_place and (shard.master is not None or exact):
                shard.working = original
        self._frozen.to_checkpoint_dtype()
        self.has_checkpoint_dtype = True

    @torch.no_grad()
    def to_working_dtype(self) -> list[str]:
        """
        Let the model compute with the working weights again. What was changed in its parameters meanwhile are the
        trained weights from now on.

        Returns:
            `list[str]`: names of the parameters whose values are others than before.
        """
        if not self.has_checkpoint_dtype:
            return []
        changed = []
        for shard in self.shards:
            if not shard.layout.in_parameter:
                continue
            data = shard.parameter.data.reshape(-1).to(shard.trained.device)
            dtype = shard.checkpoint_dtype
            if not same_memory(data, shard.trained) and not torch.equal(data.to(dtype), shard.trained.to(dtype)):
                shard.trained.copy_(data)
                changed.append(shard.name)
            if not shard.layout.in_place and shard.working.dtype != shard.dtype:
                separate = shard.master is not None
                shard.working = shard.trained.to(shard.working.device, shard.dtype, copy=separate)
            elif shard.master is not None:
                shard.working.copy_(shard.master)
            shard.parameter.data = shard.working.view(shard.shape)
        self._frozen.to_working_dtype()
        self.has_checkpoint_dtype = False
        return changed

    @contextlib.contextmanager
    def in_checkpoint_dtype(self) -> Iterator[None]:
        """
        Inside, the model's parameters hold the trained weights in the dtype in which they were given. Partitioned ones
        hold nothing, but are of that dtype.
        """
        if self.has_checkpoint_dtype:
            yield
            return
        self.restore()
        rounded = [shard for shard in self.shards if shard.checkpoint_dtype != shard.working.dtype]
        held = [(shard.parameter, shard.parameter.data) for shard in rounded]
        for shard in rounded:
            if shard.layout.in_parameter:
                # The master itself if it has that dtype: no copy
                shard.parameter.data = shard.trained.to(shard.checkpoint_dtype).view(shard.shape)
            else:
                shard.parameter.data = shard.parameter.data.to(shard.checkpoint_dtype)
        try:
            with self._frozen.in_checkpoint_dtype():
                yield
        finally:
            for parameter, data in held:
                parameter.data = data

    def adopt(self) -> None:
        """Inside `in_checkpoint_dtype`: take what is in the model's parameters as the trained weights."""
        for shard in self.shards:
            loaded = shard.parameter.data.reshape(-1)
            shard.trained.copy_(loaded)
            shard.working.copy_(loaded)


def _dtype_of_values(shard: Shard) -> torch.dtype:
    """Of what many members have of a parameter at once."""
    dtype = shard.working.dtype
    return torch.promote_types(dtype, torch.float32) if len(shard.shape) < 2 else dtype


def _gathered(shard: Shard, master: bool) -> Shard:
    """All of a parameter of which this process has a part, in the parameter itself."""
    layout = shard.layout
    whole = layout.gather(shard.trained) if master else None
    working = layout.gather(shard.working) if whole is None else whole.to(shard.working.dtype, copy=True)
    layout.hold(working)
    part = Part.whole(shard.name, shard.shape)
    return Shard(part, Whole(layout.parameter), shard.checkpoint_dtype, working, whole, shard.dtype)
