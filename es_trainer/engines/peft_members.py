"""Members of a run that trains an adapter of PEFT's: its own matrices with noise, in vLLM's slots."""

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..evolution import Member
from ..weights.shard import Shard
from ..weights.store import Weights
from .vllm_slots import Slots
from .vllm_weights import LoadError


if TYPE_CHECKING:
    from peft import PeftModel

PREFIX = "base_model.model."  # of the base model's names in a `PeftModel`


@dataclass(frozen=True)
class LoRALayer:
    """
    The adapter of a linear layer, which adds `scaling * b @ a` to its weight.

    Args:
        a (`nn.Parameter` of shape `(rank, inputs)`):
            Right factor.
        b (`nn.Parameter` of shape `(outputs, rank)`):
            Left factor.
        scaling (`float`):
            What PEFT makes of `lora_alpha` and the rank.
    """

    a: nn.Parameter
    b: nn.Parameter
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight."""
        return len(self.b), self.a.shape[1]


def lora_layers(model: "PeftModel") -> dict[str, LoRALayer]:
    """
    The layers of a model's adapter, by the name of the weight that they add to.

    Raises:
        `ValueError`: If the adapter is of other modules than linear layers, too; names one.
    """
    # Imported where it is used: importing peft takes seconds
    from peft.tuners.lora import Linear, LoraLayer

    adapter, found = model.active_adapter, {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = name.removeprefix(PREFIX)
        if not isinstance(module, Linear):
            raise ValueError(
                f"vLLM has adapters of linear layers, but `peft_config` adds one to `{name}`, which is none. Leave it "
                "out of `target_modules`, or set use_vllm=False."
            )
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        found[f"{name}.weight"] = LoRALayer(a, b, module.scaling[adapter])
    return found


def require_slots(weights: Collection[str], found: Container[str]) -> None:
    """
    Args:
        weights (`Collection[str]`):
            Names of the weights that the layers of an adapter add to.
        found (`Container[str]`):
            Those that have slots.

    Raises:
        [`LoadError`]: If vLLM has no slots for a layer; names it.
    """
    missing = [name.removesuffix(".weight") for name in weights if name not in found]
    if missing:
        raise LoadError(
            f"vLLM has no adapters for {len(missing)} of the {len(weights)} modules of `peft_config`: "
            f"{', '.join(missing[:4])}{', ...' * (len(missing) > 4)}. Leave them out of `target_modules`, or set "
            "use_vllm=False."
        )


def largest_rank(layers: Mapping[str, LoRALayer]) -> int:
    """The rank that slots need for all layers."""
    return max(len(layer.a) for layer in layers.values())


class AdapterMembers:
    """
    Writes members of an adapter.

    Args:
        weights ([`Weights`]):
            The adapter's weights, with perturbations of any shape.
        layers (`Mapping[str, LoRALayer]`):
            What `lora_layers` returned.
        slots (`Mapping[str, Slots]`):
            The slots of each layer, by the same names.
    """

    def __init__(self, weights: Weights, layers: Mapping[str, LoRALayer], slots: Mapping[str, Slots]):
        self.weights = weights
        shards = {shard.parameter: shard for shard in weights.shards}
        self._layers = [(shards[own.a], shards[own.b], own.scaling, slots[name]) for name, own in layers.items()]

    def write(self, members: Sequence[Member], sigma: float, first: int = 0) -> None:
        """Write the members, or the unperturbed adapter, into the slots from `first` on."""
        if not members:
            return
        for a, b, scaling, slots in self._layers:
            slots.write(first, self._values(a, members, sigma), self._values(b, members, sigma) * scaling)

    def _values(self, shard: Shard, members: Sequence[Member], sigma: float) -> torch.Tensor:
        return self.weights.values_of_members(shard, members, sigma, shard.dtype)
