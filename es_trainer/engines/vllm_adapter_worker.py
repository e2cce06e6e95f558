"""What a worker of a vLLM server does for a trainer that has an adapter of PEFT's, of which it sends the weights."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
from torch import nn

from ..evolution import Member
from ..run.history import make_optimizer
from ..weights.checksum import checksum
from .peft_members import AdapterMembers, LoRALayer
from .vllm_slots import Slots
from .vllm_worker_methods import NotBegun, reported, require_dtype


UNPERTURBED, UNPERTURBED_SLOT = Member(0, 0), 0  # members are in the slots that follow


class AdapterWorker:
    """Methods of [`WorkerExtension`] by which members of an adapter get into its slots. The base stays as it is."""

    _slots: Mapping[str, Slots]
    _adapter: AdapterMembers
    _adapter_digest: str | None = None  # of the adapter that is here

    @reported
    def base_checksum(self) -> dict[str, Any]:
        """The `"checksum"` of what this worker has of the base model."""
        parameters = (parameter.data.reshape(-1) for parameter in self.get_model().parameters())
        return {"checksum": sum(map(checksum, parameters)) % (1 << 64)}

    @reported
    def take_adapter(self, digest: str, description: dict[str, Any], weights: str) -> dict[str, Any]:
        """
        Take an adapter, of which members are written from now on.

        Args:
            digest (`str`):
                What the adapter is known by.
            description (`dict[str, Any]`):
                Its `"layers"`: the names of their factors and their scaling, by the names of the weights that they add
                to. The `"config"` of the run, the `"dtype"` in which the model is given, and the names of parameters
                in `"float32"`.
            weights (`str`):
                Unperturbed factors in the best precision there is: safetensors as base64.
        """
        if not self._slots:
            raise NotBegun("The adapter slots are not open: the server was started anew.")
        config = description["config"]
        require_dtype(self.model_config.dtype, config, description["dtype"])
        self._adapter_digest = None
        tensors = safetensors.torch.load(base64.b64decode(weights))
        layers, parameters = {}, []
        for name, (a, b, scaling) in description["layers"].items():
            device = self._slots[name].a.device
            own = [nn.Parameter(tensors[factor].to(device), requires_grad=False) for factor in (a, b)]
            layers[name] = LoRALayer(*own, scaling)
            parameters += zip((a, b), own, strict=True)
        # Only its weights are of use: the trainer does the updates
        optimizer = make_optimizer(parameters, set(), config, float32=description["float32"])
        self._adapter = AdapterMembers(optimizer.weights, layers, self._slots)
        self._adapter_digest = digest
        return {}

    @reported
    def install_adapters(self, members: Sequence[tuple[int, int]], sigma: float, digest: str) -> dict[str, Any]:
        """Write an adapter, and members of it, given as seeds and signs, into the slots."""
        if self._adapter_digest is None:
            raise NotBegun("No adapter is here: the server was started anew.")
        if self._adapter_digest != digest:
            raise RuntimeError(
                "It has another adapter than this run: another trainer uses it. Give each trainer servers of its own."
            )
        self._adapter.write([UNPERTURBED, *(Member(*member) for member in members)], sigma)
        return {}
