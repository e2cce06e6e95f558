"""An evolution strategy whose weights are on vLLM servers."""

import contextlib
import math
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.distributed.checkpoint import StorageReader

from ..evolution import EvolutionStrategy
from ..weights.distributed_checkpoint import Slice
from ..weights.store import Weights
from .vllm_replicas import Replicas


class RemoteWeights(Weights):
    """Weights that are on servers: the parameters here are on the meta device, without values."""

    def check(self, model: nn.Module) -> None:
        """Servers check their own weights."""

    def not_finite(self) -> None:
        """Whether servers' weights are finite is not known here."""

    def to_checkpoint_dtype(self) -> None:
        """There are no values to give to the model's parameters."""

    def in_working_dtype(self) -> contextlib.AbstractContextManager[list[str]]:
        """Servers evaluate the unperturbed weights by themselves."""
        return contextlib.nullcontext([])


class RemoteStrategy(EvolutionStrategy):
    """
    An [`EvolutionStrategy`] whose weights are on servers.

    `ask` and `tell` work as always. `step` has every server do the update.
    """

    weights_kind = RemoteWeights
    replicas: Replicas
    distance = 0.0
    norm = 0.0

    def restore(self) -> None:
        """Servers restore by themselves, before they generate with the unperturbed weights."""

    def step(self, closure: None = None) -> None:
        """Have the servers move the weights by what was told, and forget it."""
        record = {**asdict(self.update_record), "learning_rate": self.param_groups[0]["lr"], "in_place": True}
        results = self.replicas.update(record)
        self.update_norm = math.hypot(*(result["update_norm"] for result in results))
        self.distance = math.hypot(*(result["distance"] for result in results))
        self.norm = math.hypot(*(result["weight_norm"] for result in results))
        self.updates += 1
        self.update_record = None

    def distance_from_start(self) -> float:
        """Euclidean distance between the weights and the initial ones, as the servers measured it."""
        return self.distance

    def weight_norm(self) -> float:
        """Euclidean norm of the weights, as the servers measured it."""
        return self.norm

    def facts(self) -> dict[str, Any]:
        """The number of updates and the checksums of the weights; the history has the rest."""
        return {"updates": self.updates, "checksum": self.replicas.checksum}

    def slices(self) -> dict[str, Slice]:
        """There are no weights here."""
        return {}

    def load(self, facts: dict[str, Any], reader: StorageReader) -> None:
        """Go on from a state of the history in `replicas.update_records`, which may have further updates."""
        self.updates = facts["updates"]
        self.replicas.replay(self.replicas.update_records[: self.updates], facts["checksum"])
