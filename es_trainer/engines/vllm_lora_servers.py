"""vLLM servers with many adapters at the same time, each of which is a member."""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence

from ..evolution import Member
from .vllm_client import ServerError
from .vllm_members import WeightsOf
from .vllm_replicas import Replicas
from .vllm_server_engine import VLLMServerEngine
from .vllm_server_pool import Server, ServerPool
from .vllm_servers import VLLMServers
from .vllm_slots import PATH, slot_name
from .vllm_weights import require_used_weights


class SlotPool(ServerPool):
    """Servers whose adapter slots members are written into."""

    shapes: dict[str, list[int]]  # of the weights that adapters add to
    rank: int  # of the adapters
    rank_from: str  # what asks for that rank

    def connect(self, server: Server) -> None:
        self.open_slots(server)
        super().connect(server)

    def open_slots(self, server: Server) -> tuple[set[str], int]:
        """
        Make a server's adapter slots ready for members.

        Returns:
            `tuple[set[str], int]`: The names of the parameters with slots, and how many slots there are.

        Raises:
            [`ServerError`]: If the server has no slots, or none of that rank.
        """
        found = server.call("open_slots", self.shapes)[0]
        if found["rank"] < self.rank:
            raise ServerError(
                f"The adapters of the vLLM server {server.url} have a rank of at most {found['rank']}, but "
                f"{self.rank_from}: start it with a larger --max-lora-rank."
            )
        if slot_name(0) not in server.models():  # which is tried by that name
            server.load_adapter(slot_name(0), PATH)
        return set(found["names"]), found["slots"]


class LoRAReplicas(SlotPool, Replicas):
    """The servers of a run whose members are adapters of weights that all of them update; see [`Replicas`]."""


class VLLMLoRAServerEngine(VLLMServerEngine):
    """Generates on one server that has members in its adapter slots; see [`VLLMServerEngine`]."""

    first_slot = 0  # of members
    unperturbed_slot: int | None = None  # of the adapter of the unperturbed weights, if they have one

    def _weights(self) -> WeightsOf:
        members = self._perturbed()
        return ("install", (members, self.sigma)) if members else super()._weights()

    def _perturbed(self) -> list[tuple[int, int]]:
        """Seeds and signs of the members that need a slot."""
        return [(member.seed, member.sign) for member in self.members if not member.is_center]

    def _slots(self, members: list[int]) -> list[int | None]:
        slots = itertools.count(self.first_slot)
        of_members = [self.unperturbed_slot if member.is_center else next(slots) for member in self.members]
        return [of_members[member] for member in members] if of_members else [self.unperturbed_slot] * len(members)


class VLLMLoRAServers(VLLMServers):
    """
    Generates on vLLM servers, which evaluate groups of members as adapters of one batch; see [`VLLMServers`].

    A server has slots for as many members as `--max-loras` says.
    """

    replicas_kind: type[SlotPool] = LoRAReplicas
    engine_kind = VLLMLoRAServerEngine
    replicas: SlotPool

    def open_slots(self) -> set[str]:
        """
        Make all servers' adapter slots ready for members.

        Returns:
            `set[str]`: The names of the parameters that have slots.

        Raises:
            [`ServerError`]: If a server has no slots, or too few for `population_batch_size`.
            [`LoadError`]: If a server does not compute with what is in them.
        """
        self.replicas.shapes = self._shapes()
        self.replicas.rank, self.replicas.rank_from = self._rank()
        names, slots = zip(*map(self.replicas.open_slots, self.replicas.servers), strict=True)
        for server in self.replicas.servers:
            self._check_slots_are_used(server, names[0])
        first = self.engine_kind.first_slot
        members = [count - first for count in slots]
        self.most_members = self.args.population_batch_size or max(1, min(members))
        if min(members) < self.most_members:
            raise ServerError(
                f"`population_batch_size={self.args.population_batch_size}`, but the vLLM server "
                f"{self.replicas.servers[members.index(min(members))].url} has adapters for {min(members)} members: "
                f"start it with --max-loras {self.most_members + first} or more."
            )
        return names[0]

    def _shapes(self) -> dict[str, list[int]]:
        """Shapes of the weights that adapters may add to, by name."""
        return {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}

    def _rank(self) -> tuple[int, str]:
        """The rank that slots need, and what asks for it."""
        return self.args.perturbation_rank, f"`perturbation_rank={self.args.perturbation_rank}`"

    def _check_slots_are_used(self, server: Server, names: set[str]) -> None:
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
