"""vLLM servers with a base model that is not trained, and members of an adapter of PEFT's that the trainer has."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import safetensors.torch
import torch

from ..run.history import run_config
from ..weights.store import Weights
from .peft_members import largest_rank, lora_layers, require_slots
from .vllm_adapter_worker import UNPERTURBED_SLOT
from .vllm_client import ServerError
from .vllm_dispatch import Job
from .vllm_lora_servers import SlotPool, VLLMLoRAServerEngine, VLLMLoRAServers
from .vllm_members import WeightsOf
from .vllm_server_pool import Server
from .vllm_servers import Done


T = TypeVar("T")


@dataclass(frozen=True)
class Adapter:
    """
    An adapter as servers get it.

    Args:
        digest (`str`):
            Another one if a bit of the adapter is.
        content (`tuple`):
            The other arguments of [`AdapterWorker.take_adapter`].
    """

    digest: str = ""
    content: tuple[dict[str, Any], str] = ({}, "")


class AdapterServer(Server):
    """A vLLM server with the base model, and the digest of the adapter that it has."""

    digest = ""


class AdapterPool(SlotPool):
    """
    The servers of a run that trains an adapter. Each gets the adapter before its first job after every step: there is
    nothing that a server which was lost has to do again.
    """

    server_kind = AdapterServer
    adapter = Adapter()  # that servers have to have
    base: tuple[list[int], str] | None = None  # checksums of the base model, and a server that has it

    def connect(self, server: AdapterServer) -> None:
        super().connect(server)
        server.digest = ""
        checksums = [response["checksum"] for response in server.call("base_checksum")]
        if self.base is None:
            self.base = checksums, server.url
        if checksums != self.base[0]:
            raise ServerError(
                f"The vLLM server {server.url} has another base model than {self.base[1]}. Start all servers with the "
                "same model, on the same kind of device and with the same --tensor-parallel-size."
            )

    def catch_up(self, server: AdapterServer) -> bool:
        adapter = self.adapter  # which another step may replace meanwhile
        if server.digest == adapter.digest:
            return True
        server.call("take_adapter", adapter.digest, *adapter.content)
        server.digest = adapter.digest
        return False


class VLLMAdapterServerEngine(VLLMLoRAServerEngine):
    """Generates on one server that has an adapter and members of it in its slots; see [`VLLMServerEngine`]."""

    first_slot = UNPERTURBED_SLOT + 1
    unperturbed_slot = UNPERTURBED_SLOT
    server: AdapterServer

    def _weights(self) -> WeightsOf:
        return "install_adapters", (self._perturbed(), self.sigma, self.server.digest)


class VLLMAdapterServers(VLLMLoRAServers):
    """
    Generates on vLLM servers with an adapter, which this process has; see [`VLLMLoRAServers`].

    `--max-loras` of a server is one more than the members that it has slots for.
    """

    replicas_kind = AdapterPool
    engine_kind = VLLMAdapterServerEngine
    replicas: AdapterPool

    def slots(self) -> set[str]:
        """
        Make all servers' slots ready. Returns the names of the weights that have some.

        Raises:
            [`ServerError`]: If a server has no slots, or too few.
            [`LoadError`]: If vLLM has no slots for a layer, or does not compute with what is in them.
        """
        found = self.open_slots()
        require_slots(self.replicas.shapes, found)
        return found

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(layer.shape) for name, layer in lora_layers(self.model).items()}

    def _rank(self) -> tuple[int, str]:
        rank = largest_rank(lora_layers(self.model))
        return rank, f"`peft_config` has a rank of {rank}"

    def connect(self, weights: Weights) -> None:
        """
        Give all servers the adapter.

        Args:
            weights ([`Weights`]):
                The adapter's weights.

        Raises:
            [`ServerError`]: If a server computes in another dtype, or has another base model than the others.
        """
        self._adapter_weights = weights
        names = {shard.parameter: shard.name for shard in weights.shards}
        self._description = {
            "layers": {
                name: (names[layer.a], names[layer.b], layer.scaling)
                for name, layer in lora_layers(self.model).items()
            },
            "config": run_config(self.args),
            "dtype": str((self.args.model_init_kwargs or {}).get("dtype", torch.float32)),
            "float32": [shard.name for shard in weights.shards if shard.dtype == torch.float32],
        }
        self._take_adapter()
        for server in self.replicas.servers:
            with server.lock:
                self.replicas.connect(server)
                self.replicas.catch_up(server)

    def _take_adapter(self) -> None:
        """Have servers get the adapter as it is now, before their next job."""
        tensors = {shard.name: shard.trained.view(shard.shape) for shard in self._adapter_weights.shards}
        data = safetensors.torch.save(tensors)
        digest = hashlib.blake2b(json.dumps(self._description).encode() + data, digest_size=16).hexdigest()
        if digest != self.replicas.adapter.digest:
            self.replicas.adapter = Adapter(digest, (self._description, base64.b64encode(data).decode()))

    def _dispatch(
        self, jobs: Sequence[Job], do: Callable[[Job, Server], Done[T]], splits: bool, repeats: bool
    ) -> Iterator[Done[T]]:
        self._take_adapter()
        return super()._dispatch(jobs, do, splits, repeats)
