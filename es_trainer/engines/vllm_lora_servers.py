"""vLLM servers with many adapters at the same time, each of which is a member."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ..evolution import Member
from .live_weights import find_unused_weights
from .vllm_client import ServerError
from .vllm_dispatch import dispatch
from .vllm_replicas import Replica, Replicas
from .vllm_server_engine import VLLMServerEngine
from .vllm_servers import Done, VLLMServers
from .vllm_slots import PATH, slot_name
from .vllm_weights import load_error


T = TypeVar("T")


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
        known = server.models()
        for slot in range(found["slots"]):  # in this order, in which the server counts its adapters
            if slot_name(slot) not in known:
                server.load_adapter(slot_name(slot), PATH)
        return set(found["names"]), found["slots"]


class VLLMLoRAServers(VLLMServers):
    """
    Generates on vLLM servers, which evaluate groups of members as adapters of one batch; see [`VLLMServers`].

    A server has slots for as many members as `--max-loras` says.
    """

    replicas_kind = LoRAReplicas
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
        problems = find_unused_weights(sorted(names), filled, logprobs, self.tokenizer, self.context)
        if problems:
            raise load_error([f"{server.url}, of adapters: {problem}" for problem in problems])

    def group_size(self, count: int) -> int:
        """How many of `count` members a server evaluates together: no more than leaves some for the others."""
        return max(1, min(self.most_members, -(-count // len(self.replicas.servers))))

    def evaluate_groups(
        self,
        groups: Sequence[Sequence[Member]],
        sigma: float,
        do: Callable[[int, VLLMServerEngine, list[str | None]], T],
    ) -> Iterator[Done[T]]:
        """
        Do something with each group of members.

        Args:
            groups (`Sequence[Sequence[Member]]`):
                The groups.
            sigma (`float`):
                Standard deviation of the noise.
            do (`Callable`):
                Gets the number of a group, a server that has its members, and the names of the adapters that these
                are, where `None` is the unperturbed weights; in a thread of the server. It is called again, with
                another server, if that one is lost meanwhile.

        Returns:
            `Iterator[Done]`: groups in the order in which servers are done with them.
        """

        def evaluate_on(job: int, server: Replica) -> Done[T]:
            start = time.perf_counter()
            perturbed = [member for member in groups[job] if not member.is_center]
            server.call("install", [(member.seed, member.sign) for member in perturbed], sigma)
            installed = time.perf_counter()
            slots = iter(range(len(perturbed)))
            adapters = [None if member.is_center else slot_name(next(slots)) for member in groups[job]]
            result = do(job, self._engine(server, (0, 1)), adapters)
            return Done(job, server.url, result, time.perf_counter() - installed, installed - start)

        yield from dispatch(self.replicas, len(groups), evaluate_on)
