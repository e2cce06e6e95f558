"""vLLM's adapter slots: where each LoRA layer of a worker has the matrices of adapters, and members are written.

vLLM generates with as many adapters at the same time as it has slots. Each slot belongs to an adapter of its own all
the time, which vLLM neither loads nor moves: what is in the slot is the adapter.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..evolution import Member
from ..weights.store import Weights
from .vllm_weights import engine_names


if TYPE_CHECKING:
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.request import LoRARequest


PATH = "/written/by/es_trainer"  # vLLM wants one of every adapter; this one is never read


@dataclass(frozen=True)
class Slots:
    """
    What a worker has of the slots of a linear layer. Slot `i` adds `b[i] @ a[i]` to the weight.

    Args:
        a (`torch.Tensor` of shape `(slots, largest rank, inputs)`):
            Right factors.
        b (`torch.Tensor` of shape `(slots, outputs, largest rank)`):
            Left factors.
        inputs (`slice` or `torch.Tensor`):
            Which of the layer's inputs the worker has.
        outputs (`slice` or `torch.Tensor`):
            Which of the layer's outputs the worker has.
    """

    a: torch.Tensor
    b: torch.Tensor
    inputs: slice | torch.Tensor
    outputs: slice | torch.Tensor

    def write(self, first: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """
        Write adapters into the slots from `first` on.

        Args:
            first (`int`):
                Number of the slot of the first adapter.
            a (`torch.Tensor` of shape `(adapters, rank, all inputs)`):
                Right factors.
            b (`torch.Tensor` of shape `(adapters, all outputs, rank)`):
                Left factors.
        """
        slots, rank = slice(first, first + len(a)), a.shape[1]
        self.a[slots, :rank].copy_(a[:, :, self.inputs])
        self.b[slots, :, :rank].copy_(b[:, self.outputs])

    def fill(self) -> None:
        """Write noise into the first slot, the same in every process."""
        generator = torch.Generator(self.a.device).manual_seed(0)
        for factor in (self.a[0], self.b[0]):
            factor.normal_(std=1 / math.sqrt(factor.shape[1]), generator=generator)

    def clear(self) -> None:
        """Write zeros into the first slot."""
        self.a[0].zero_()
        self.b[0].zero_()

    @contextlib.contextmanager
    def filled(self) -> Iterator[None]:
        """Inside, the first slot has noise; afterwards, zeros."""
        self.fill()
        try:
            yield
        finally:
            self.clear()


def find_slots(engine: nn.Module, weights: Mapping[str, Sequence[int]]) -> dict[str, Slots]:
    """
    Find the slots of weights of a Transformers model in vLLM's model.

    Args:
        engine (`nn.Module`):
            The model of a vLLM worker, with LoRA enabled.
        weights (`Mapping[str, Sequence[int]]`):
            Names and shapes `(outputs, inputs)` of the weights.

    Returns:
        `dict[str, Slots]`: The slots of those that adapters can change, which are the weights of linear layers.

    Raises:
        `ValueError`: If the worker shards adapters further than its layers.
    """
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    manager = engine.lora_manager
    if manager.lora_config.fully_sharded_loras:
        raise ValueError("Members cannot be written into the adapters of --fully-sharded-loras: leave it out.")
    layers = {f"{name}.weight": m for name, m in manager.modules.items() if isinstance(m, BaseLinearLayerWithLoRA)}
    found = {}
    for name, shape in weights.items():
        holder = next((holder for holder in engine_names(name, engine) if holder in layers), None)
        slots = None if holder is None else _slots_of(layers[holder], *_part(name, holder, engine), shape)
        if slots is not None:
            found[name] = slots
    return found


def _part(name: str, holder: str, engine: nn.Module) -> tuple[int, int]:
    """Which of the projections that vLLM has fused in a layer a weight is, and of how many."""
    projection, layer = (each.split(".")[-2] for each in (name, holder))
    parts = engine.packed_modules_mapping.get(layer, [])
    return (parts.index(projection), len(parts)) if projection in parts else (0, 1)


def _slots_of(layer: Any, part: int, parts: int, shape: Sequence[int]) -> Slots | None:
    """The slots of a layer, or of a part of it, for a weight of that shape; `None` if they do not hold it."""
    if len(shape) != 2 or layer.n_slices != parts:
        return None
    # Which of them the worker has is what vLLM takes of their numbers
    outputs, inputs = torch.arange(shape[0]).view(-1, 1), torch.arange(shape[1]).view(1, -1)
    if layer.n_slices == 1:
        inputs, outputs = layer.slice_lora_a(inputs), layer.slice_lora_b(outputs)
    else:
        inputs, outputs = (
            take([numbers if i == part else None for i in range(layer.n_slices)])[part]
            for take, numbers in ((layer.slice_lora_a, inputs), (layer.slice_lora_b, outputs))
        )
    a, b = layer.lora_a_stacked[part][:, 0], layer.lora_b_stacked[part][:, 0]
    if (inputs.numel(), outputs.numel()) != (a.shape[2], b.shape[1]):
        return None
    return Slots(a, b, _index(inputs, a.device), _index(outputs, a.device))


def _index(numbers: torch.Tensor, device: torch.device) -> slice | torch.Tensor:
    first, count = int(numbers.flatten()[0]), numbers.numel()
    consecutive = torch.equal(numbers.flatten(), torch.arange(first, first + count))
    return slice(first, first + count) if consecutive else numbers.flatten().to(device)


def occupy_slots(manager: "LoRAModelManager") -> int:
    """Give each of a worker's slots to the adapter of `slot_request`, with zeros in it. Returns how many there are."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    numbers = [slot + 1 for slot in range(manager.lora_slots)]
    manager.remove_all_adapters()
    for number in numbers:
        # vLLM takes no adapter without a layer, but any name for it
        nothing = LoRALayerWeights.create_dummy_lora_weights("none", 1, 1, 1, torch.float32, "cpu")
        manager.add_adapter(LoRAModel(number, 1, {"none": nothing}))
        manager.activate_adapter(number)
    if manager.lora_index_to_id != numbers:
        raise RuntimeError(f"vLLM has the adapters {manager.lora_index_to_id} in its slots instead of {numbers}.")
    return len(numbers)


def slot_request(slot: int) -> "LoRARequest":
    """What vLLM generates by with the adapter that is in a slot."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(slot_name(slot), slot + 1, PATH)


def slot_name(slot: int) -> str:
    """The name of the adapter that is in a slot."""
    return f"slot-{slot}"


class LowRankMembers:
    """
    Writes members as adapters of the unperturbed weights: the factors of their noise.

    Args:
        weights ([`Weights`]):
            The trained weights, with low-rank perturbations.
        slots (`Mapping[str, Slots]`):
            The slots of each of them, by its name.
    """

    def __init__(self, weights: Weights, slots: Mapping[str, Slots]):
        self.weights = weights
        self.slots = slots

    def write(self, members: Sequence[Member], sigma: float) -> None:
        """Write the members into the slots, from the first on."""
        if not members:
            return
        for shard, factors in self.weights.all_of_members(members, sigma):
            self.slots[shard.name].write(0, factors.right[:, 0], factors.left[:, 0].mT)
