"""A worker that can be broken, and counts the bytes of the models that it loads and of the weights that it keeps."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from es_trainer.engines.vllm_slots import Slots
from es_trainer.engines.vllm_worker import WorkerExtension


def compute_with_a_copy(layer: nn.Module, when: Callable[[torch.Tensor], bool] = lambda x: True) -> None:
    """Break a linear layer of vLLM: for some inputs, it does not compute with its weights as they are from now on."""
    copy = layer.weight.data.clone()
    layer.cpu_linear = lambda x, weight, bias: linear(x, copy if when(x) else weight, bias)


def as_text(slots: Mapping[str, Slots]) -> dict[str, list[str]]:
    """The bytes that are in each adapter slot of each weight, hashed."""

    def bits(values: torch.Tensor) -> bytes:
        return values.contiguous().view(torch.uint8).numpy().tobytes()

    return {
        name: [hashlib.sha1(bits(a) + bits(b)).hexdigest() for a, b in zip(own.a, own.b, strict=True)]
        for name, own in slots.items()
    }


class Watched(WorkerExtension):
    loaded = 0

    def bytes(self) -> dict[str, Any]:
        """Of models that were loaded, of the weights that this worker trains, and of the memory that these keep."""
        masters = [shard.master for shard in self._strategy.weights.shards]
        return {
            "loaded": self.loaded,
            "trained": sum(master.nbytes for master in masters),
            "kept": sum(master.untyped_storage().nbytes() for master in masters),
        }

    def slots_as_text(self) -> dict[str, Any]:
        """All that is in the adapter slots, by the names of the weights that they add to."""
        return as_text(self._slots)

    def compute_with_a_copy(self, module: str) -> dict[str, Any]:
        compute_with_a_copy(self.get_model().get_submodule(module))
        return {}

    def _load(self, *args: Any) -> PreTrainedModel:
        model = super()._load(*args)
        self.loaded += sum(parameter.nbytes for parameter in model.parameters())
        return model
