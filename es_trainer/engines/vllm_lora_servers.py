"""vLLM servers with many adapters at the same time, each of which is a member."""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence

from ..evolution import Member
from .vllm_client import ServerError
from .vllm_members import WeightsOf
from .vllm_replicas import Replica, Replicas
from .vllm_server_engine import VLLMServerEngine
from .vllm_servers import VLLMServers
from .vllm_slots import PATH, slot_name
from .vllm_weights import require_used_weights


class LoRAReplicas(Replicas):
    """The servers of a run whose members are adapters; see [`Replicas`]."""

    shapes: dict[str, list[int]]  # of the model's parameters

    def connect(self, server: Replica) -> None:
        self.open_slots(server)
        super().connect(server)

    def open_slots(self, server: Replica) -> tuple[set[str], int]:
        """
        Make a server's adapter slots ready for members.

        Returns:
            `tuple[set[str], int]`: The names of the parameters with slots, and how many members there are slots for.

        Raises:
            [`ServerError`]: If the server has no slots, or none of that rank.
        """
        found = server.call("open_slots", self.shapes)[0]
        if found["rank"] < self.args.perturbation_rank:
            raise ServerError(
                f"The adapters of the vLLM server {server.url} have a rank of at most {found['rank']}, but "
                f"`perturbation_rank={self.args.perturbation_rank}`: start it with a larger --max-lora-rank."
            )
        if slot_name(0) not in server.models():  # which is tried by that name
            server.load_adapter(slot_name(0), PATH)
        return set(found["names"]), found["slots"]


class VLLMLoRAServerEngine(VLLMServerEngine):
    """Generates on one server that has members in its adapter slots; see [`VLLMServerEngine`]."""

    def _weights(self) -> WeightsOf:
        members = [(member.seed, member.sign) for member in self.members if not member.is_center]
        return ("install", (members, self.sigma)) if members else super()._weights()

    def _slots(self, members: list[int]) -> list[int | None]:
        slots = itertools.count()
        of_members = [None if member.is_center else next(slots) for member in self.members]
        return [of_members[member] for member in members] if of_members else super()._slots(members)


class VLLMLoRAServers(VLLMServers):
    """
    Generates on vLLM servers, which evaluate groups of members as adapters of one batch; see [`VLLMServers`].

    A server has slots for as many members as `--max-loras` says.
    """

    replicas_kind = LoRAReplicas
    engine_kind = VLLMLoRAServerEngine
    replicas: LoRAReplicas

    def open_slots(self) -> set[str]:
        """
        Make all servers' adapter slots ready for members.

        Returns:
            `set[str]`: The names of the parameters that have slots.

        Raises:
            [`ServerError`]: If a server has no slots, or too few for `population_batch_size`.
            [`LoadError`]: If a server does not compute with what is in them.
        """
        self.replicas.shapes = {name: list(p.shape) for name, p in self.model.named_parameters()}
        names, slots = zip(*map(self.replicas.open_slots, self.replicas.servers), strict=True)
        for server in self.replicas.servers:
            self._check_slots_are_used(server, names[0])
        self.most_members = self.args.population_batch_size or min(slots)
        if min(slots) < self.most_members:
            raise ServerError(
                f"`population_batch_size={self.most_members}`, but the vLLM server "
                f"{self.replicas.servers[slots.index(min(slots))].url} has adapters for {min(slots)} members: start "
                "it with a larger --max-loras."
            )
        return names[0]

    def _check_slots_are_used(self, server: Replica, names: set[str]) -> None:
        @contextlib.contextmanager
        def filled(name: str) -> Iterator[None]:
            server.call("fill_slot", name)
            try:
                yield
            finally:
                server.call("clear_slot", name)

        logprobs = functools.partial(server.logprobs, adapter=slot_name(0))
        where = f"{server.url}, of adapters: "
        require_used_weights(sorted(names), filled, logprobs, self.tokenizer, self.context, where)

    def _groups(self, members: Sequence[Member]) -> list[tuple[int, ...]]:
        # The unperturbed weights, which need no slot, go with the last members
        count = sum(not member.is_center for member in members)
        # No more than leaves some for the other servers
        size = max(1, min(self.most_members, -(-count // len(self.replicas.servers))))
        starts = range(0, count, size) or [0]
        return [tuple(range(start, start + size if start + size < count else len(members))) for start in starts]
