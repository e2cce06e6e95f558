"""vLLM's workers hold the trained weights, and perturb, update and export them.

vLLM imports this module in each worker before it loads the model, and mixes the class into its own.
"""

import base64
import os
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from vllm.config import set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size, get_tp_group
from vllm.platforms import current_platform

from .. import auto_model
from ..evolution import EvolutionStrategy, Member
from ..run.history import extend_digest, first_digest, make_optimizer, replay_step, trained_parameters
from ..weights.layouts import EngineWeights
from ..weights.part import Part
from .live_weights import overwrite
from .vllm_adapter_worker import AdapterWorker
from .vllm_base_model import all_workers, broadcast_parameters, load_on_first_rank
from .vllm_slots import LowRankMembers, Slots, find_slots, occupy_slots
from .vllm_weights import find_engine_weights, has_values, refuse_other_values
from .vllm_worker_methods import NotBegun, reported, require_dtype


def _prepare_cpu() -> None:
    """Keep vLLM's CPU backend from packing weights into forms that cannot be perturbed, and from three traps."""
    from llvmlite.binding import ffi
    from vllm._custom_ops import cpu_prepack_moe_weight
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    def plain_linear(layer: nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    def unpacked_experts(self: CPUUnquantizedExperts, layer: nn.Module) -> None:
        self._use_zentorch = False

    def pack_and_apply(self: CPUUnquantizedExperts, *, w1: torch.Tensor, w2: torch.Tensor, **others: Any) -> None:
        w1, w2 = (cpu_prepack_moe_weight(weights, self.isa) for weights in (w1, w2))
        apply(self, w1=w1, w2=w2, **others)

    def shrink_with_adapters(
        inputs: torch.Tensor, factors: torch.Tensor, output: torch.Tensor, slots: torch.Tensor, scaling: float = 1.0
    ) -> None:
        shrink(inputs, factors, output, slots, scaling)
        output[slots < 0] = 0.0

    apply, shrink = CPUUnquantizedExperts.apply, lora_ops.bgmv_shrink
    utils.dispatch_cpu_unquantized_gemm = plain_linear
    CPUUnquantizedExperts.process_weights_after_loading = unpacked_experts
    CPUUnquantizedExperts.apply = pack_and_apply
    # vLLM looks into every object of every module, and trips over this one of Numba's, which has any attribute
    ffi.lib._fntab["__dict__"] = {}
    # Rows without an adapter have the slot -1, which on CPU would be the last one
    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = shrink_with_adapters
    # Two runs on a machine, or one after another that was killed, would have shared memory of the same name
    name = _CPUSHMDistributed.make_group_name
    _CPUSHMDistributed.make_group_name = staticmethod(lambda communicator: f"{name(communicator)}-{os.getppid()}")


if current_platform.is_cpu():
    _prepare_cpu()


class WorkerExtension(AdapterWorker):
    """
    What a vLLM worker does for evolution strategies, as `worker_extension_cls`.

    A trainer in the same process asks where the weights of the parameters are and does the rest by itself. A
    trainer in another process calls the other methods, which return a `dict` that can be JSON; after an error, it has
    an `"error"`.
    """

    _run: dict[str, Any] | None = None  # what `begin` was given
    # Parameters and buffers of the base model that the run does not train, in the worker that loaded it
    _untrained: Mapping[str, torch.Tensor] = MappingProxyType({})
    _engine_weights: Mapping[str, EngineWeights] = MappingProxyType({})
    _slots: Mapping[str, Slots] = MappingProxyType({})
    _overwritten: tuple[torch.Tensor, torch.Tensor] | None = None  # weights, and their values before
    _checked = False  # whether the engine's weights were those of the base model
    _strategy: EvolutionStrategy | None = None
    _digest = ""

    def engine_weights(
        self, parameters: dict[str, Sequence[int]], dispensable: Collection[str] = ()
    ) -> dict[str, EngineWeights]:
        """
        What this worker has of the parameters of a Transformers model, given by name with their shapes. Of those that
        are dispensable, it need not have any.
        """
        shapes = {name: torch.Size(shape) for name, shape in parameters.items()}
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        return find_engine_weights(self.get_model(), shapes, rank, size, dispensable)

    def slots(self, weights: dict[str, Sequence[int]]) -> dict[str, Slots]:
        """The adapter slots of weights of a Transformers model, given by name with their shapes, where there are."""
        occupy_slots(self.get_model().lora_manager)
        return find_slots(self.get_model(), weights)

    @reported
    def load_check(self, parameters: dict[str, Sequence[int]], dispensable: Collection[str] = ()) -> dict[str, Any]:
        """Check that every parameter of a Transformers model is here that is not dispensable, with the right shape."""
        self._undo_overwrite()
        self._engine_weights = self.engine_weights(parameters, dispensable)
        return {"found": len(self._engine_weights)}

    @reported
    def overwrite(self, name: str) -> dict[str, Any]:
        """Give a parameter other weights, until `undo_overwrite` is called."""
        weights = self._engine_weights[name].weights
        self._overwritten = weights, overwrite(weights)
        return {}

    @reported
    def undo_overwrite(self) -> dict[str, Any]:
        """Give the parameter that was overwritten its own weights again."""
        self._undo_overwrite()
        return {}

    @reported
    def open_slots(self, parameters: dict[str, Sequence[int]]) -> dict[str, Any]:
        """
        Make the adapter slots ready for members.

        Args:
            parameters (`dict[str, Sequence[int]]`):
                Names and shapes of the parameters of a Transformers model.

        Returns:
            `dict`: How many `"slots"` there are, for which `"rank"`, and the `"names"` of the parameters with slots.
        """
        lora = self.vllm_config.lora_config
        if lora is None:
            raise ValueError(
                "The server has no adapters. Start it with --enable-lora --max-loras N --max-lora-rank R: N adapters "
                "in a batch, of a rank of at most R."
            )
        self._slots = self.slots(parameters)
        return {"slots": lora.max_loras, "rank": lora.max_lora_rank, "names": list(self._slots)}

    @reported
    def fill_slot(self, name: str) -> dict[str, Any]:
        """Write noise into the first slot of a parameter."""
        self._slots[name].fill()
        return {}

    @reported
    def clear_slot(self, name: str) -> dict[str, Any]:
        """Write zeros into the first slot of a parameter."""
        self._slots[name].clear()
        return {}

    @reported
    def begin(self, header: dict[str, Any], dtype: str) -> dict[str, Any]:
        """
        Begin a run, unless it has begun already.

        Args:
            header (`dict[str, Any]`):
                The first line of the run's history.
            dtype (`str`):
                The dtype in which the model is given, like `"float32"`.

        Returns:
            `dict`: The `"updates"` done in this run, the `"digest"` of its history so far, and the `"checksum"`s of
            the trained weights.
        """
        if not all_workers(self._run == {"header": header, "dtype": dtype}, get_tp_group()):
            self._restart(header, dtype)
        return self._position()

    @reported
    def restart(self, header: dict[str, Any], dtype: str) -> dict[str, Any]:
        """Begin a run from its base model, whatever was done before."""
        self._restart(header, dtype)
        return self._position()

    @reported
    def perturb(self, seed: int, sign: int, sigma: float) -> dict[str, Any]:
        """Make the weights those of a member."""
        self._running().weights.perturb(Member(seed, sign), sigma)
        return {}

    @reported
    def install(self, members: Sequence[tuple[int, int]], sigma: float) -> dict[str, Any]:
        """Write members, given as seeds and signs, into the adapter slots, from the first on."""
        strategy = self._running()
        strategy.restore()
        LowRankMembers(strategy.weights, self._slots).write([Member(*member) for member in members], sigma)
        return {}

    @reported
    def restore(self) -> dict[str, Any]:
        """Make the weights the unperturbed ones."""
        self._running().restore()
        return {}

    @reported
    def update(self, record: dict[str, Any]) -> dict[str, Any]:
        """Do the update of an update record. Returns what `begin` does, and how far the weights moved."""
        strategy = self._running()
        replay_step(strategy, record)
        self._digest = extend_digest(self._digest, record)
        return self._position() | {
            "update_norm": strategy.update_norm,
            "distance": strategy.distance_from_start(),
            "weight_norm": strategy.weight_norm(),
        }

    @reported
    def checksum(self) -> dict[str, Any]:
        """Where this worker is in the run, and the checksums of the trained weights."""
        self._running()
        return self._position()

    @reported
    def export(self, name: str, low: int, high: int) -> dict[str, Any]:
        """
        Trained or frozen weights as they are saved.

        Args:
            name (`str`):
                Name of a parameter or buffer.
            low, high (`int`):
                Which of the weights that this worker has of it.

        Returns:
            `dict`: Their bytes as base64 `"data"`, the `"dtype"`, how many this worker has (`"size"`) and which those
            are: `"offset"`, `"length"`, `"period"` and `"replica"` of a [`Part`].
        """
        shards = {shard.name: shard for shard in self._running().weights.shards}
        if name in shards:
            part, values = shards[name].part, shards[name].trained[low:high].to(shards[name].checkpoint_dtype)
        else:
            whole = self._untrained[name] if get_tp_group().is_first_rank else torch.empty(0)
            part, values = Part.whole(name, whole.shape), whole.reshape(-1)[low:high]
        return {
            "data": base64.b64encode(values.cpu().contiguous().view(torch.uint8).numpy().tobytes()).decode(),
            "dtype": str(values.dtype).removeprefix("torch."),
            "size": part.numel,
            "offset": part.offset,
            "length": part.length,
            "period": part.period,
            "replica": part.replica,
        }

    def _undo_overwrite(self) -> None:
        if self._overwritten is not None:
            weights, before = self._overwritten
            weights.copy_(before)
            self._overwritten = None

    def _restart(self, header: dict[str, Any], dtype: str) -> None:
        self._run = self._strategy = None
        self._untrained = {}
        require_dtype(self.model_config.dtype, header["config"], dtype)
        trained = self._take_weights(header, dtype)
        self._strategy = make_optimizer(
            [(name, parameter) for name, (parameter, _) in trained.items()],
            set(header["decayed"]),
            header["config"],
            engine_weights=dict(trained.values()),
        )
        self._run, self._digest = {"header": header, "dtype": dtype}, first_digest(header)

    def _take_weights(self, header: dict[str, Any], dtype: str) -> dict[str, tuple[nn.Parameter, EngineWeights]]:
        """
        Make the engine's weights those of the base model, which another run may have left otherwise.

        Returns:
            `dict[str, tuple[nn.Parameter, EngineWeights]]`: this worker's parts of the parameters to train, as they
            are given and as the engine has them.
        """
        group = get_tp_group()
        model, infos = load_on_first_rank(lambda: self._load(header, dtype), group)
        shapes = {name: info.shape for name, info in infos.items()}
        engine_weights = self.engine_weights(shapes, shapes.keys() - header["parameters"])
        trained, different = {}, []
        for name, whole in broadcast_parameters(model, infos, group):
            if model is not None and name not in header["parameters"]:
                self._untrained[name] = whole
            if name not in engine_weights:
                continue
            own = engine_weights[name]
            values = own.part.of(whole)
            if not self._checked and not has_values(own, values):
                different.append(name)
                continue
            own.weights.copy_(values)
            if name in header["parameters"]:
                original = values if own.part.is_whole else values.clone()  # which keeps no more than that in memory
                trained[name] = nn.Parameter(original, requires_grad=False), own
        refuse_other_values(different)
        self._checked = True
        if model is not None:
            buffers = {name for name, _ in model.named_buffers()}
            self._untrained |= {name: t for name, t in model.state_dict().items() if name in buffers}
        return {name: trained[name] for name in header["parameters"]}

    def _load(self, header: dict[str, Any], dtype: str) -> PreTrainedModel:
        config = self.model_config
        with set_current_vllm_config(self.vllm_config):  # whose patches of Transformers ask for it
            model = auto_model.from_pretrained(
                config.model, dtype=dtype, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        trained_parameters(model, header, "run")
        return model

    def _running(self) -> EvolutionStrategy:
        if self._strategy is None:
            raise NotBegun("No run has begun here: the server was started anew.")
        return self._strategy

    def _position(self) -> dict[str, Any]:
        return {
            "updates": self._strategy.updates,
            "digest": self._digest,
            "checksum": self._strategy.weights.checksums(),
        }
