"""vLLM servers as replicas of the trained weights: each replays the same update records, checked by checksums."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tqdm.auto import tqdm

from ..config import ESConfig
from ..run.history import extend_digest, first_digest
from .vllm_client import ServerError, ServerLost
from .vllm_server_pool import Server, ServerPool


class Replica(Server):
    """A vLLM server that has all of the weights, and how far it is in the run."""

    def __init__(self, url: str, timeout: float):
        super().__init__(url, timeout)
        self.updates: int | None = None  # that it has done in this run; `None` if that is not known
        self.last_update: list[dict[str, Any]] = []  # what its workers returned for the last update

    def lose(self, error: ServerLost) -> None:
        super().lose(error)
        self.updates = None


class Replicas(ServerPool):
    """
    The servers of a run. All of them do every update. No step waits for those that are late.

    A server that was lost and is back replays the updates from the start, and its checksums have to be those of the
    other servers before it evaluates members again.
    """

    server_kind = Replica

    def __init__(self, args: ESConfig):
        super().__init__(args)
        self.header: dict[str, Any] = {}
        self.update_records: list[dict[str, Any]] = []  # of the history: the updates that a server has to have done
        self.digests: list[str] = []  # digest `i` is of the history with `i` update records
        self.checksum: list[list[int]] | None = None  # of the weights after the last update, by worker
        self._checksum_source = ""  # the server, or the checkpoint, that `checksum` is from
        self._progress_lock = threading.Lock()  # of the records, the checksum and the servers' `updates`

    def replay(self, update_records: list[dict[str, Any]], checksum: list[list[int]] | None) -> None:
        """
        Bring the weights of all servers to the end of a history.

        Args:
            update_records (`list[dict[str, Any]]`):
                The updates of the history.
            checksum (`list[list[int]]`, *optional*):
                What the checksums of the weights must be then. If `None`, they need only be the same on all servers.

        Raises:
            [`ServerError`]: If no server is left, or a server has other weights.
        """
        self.update_records, self.digests = [], [first_digest(self.header)]
        self.checksum, self._checksum_source = checksum, "the checkpoint"
        for record in update_records:
            self._append(record)
        with tqdm(
            total=len(update_records) * len(self.servers),
            desc="Updates replayed on servers",
            disable=not update_records or self.args.disable_tqdm,
        ) as bar:

            def replay_on(server: Replica) -> None:
                with server.lock:
                    self.connect(server)
                    bar.update(server.updates)
                    while not self.catch_up(server):
                        bar.update()

            self._on_each(self.servers, replay_on)

    def _append(self, record: dict[str, Any]) -> None:
        self.update_records.append(record)
        self.digests.append(extend_digest(self.digests[-1], record))

    def connect(self, server: Replica) -> None:
        """Find out how far a server is in the run, or begin the run there."""
        dtype = (self.args.model_init_kwargs or {}).get("dtype", torch.float32)
        arguments = (self.header, str(dtype).removeprefix("torch."))
        positions = server.call("begin", *arguments)
        if not self._are_in_run(positions):
            positions = server.call("restart", *arguments)
        self._set_position(server, positions)
        super().connect(server)

    def catch_up(self, server: Replica) -> bool:
        """Have a server do the next update that it has not done. Returns whether there was none."""
        if server.updates == len(self.update_records):
            return True
        self._replay_next(server)
        return False

    def _replay_next(self, server: Replica) -> None:
        """Have a server do the update after its last one."""
        positions = server.call("update", self.update_records[server.updates])
        self._set_position(server, positions)
        server.last_update = positions

    def _are_in_run(self, positions: list[dict[str, Any]]) -> bool:
        """Whether the updates that workers have done are the first ones of this run."""
        return all(
            position["updates"] <= len(self.update_records) and position["digest"] == self.digests[position["updates"]]
            for position in positions
        )

    def _set_position(self, server: Replica, positions: list[dict[str, Any]]) -> None:
        """
        Note how far a server says that it is in the run.

        Raises:
            [`ServerError`]: If its workers are not in this run, or it has done all updates and has other weights.
        """
        updates = positions[0]["updates"]
        if not self._are_in_run(positions):
            raise ServerError(
                f"The vLLM server {server.url} has done other updates than this run: a request reached it twice, or "
                "another trainer uses it. Give each trainer servers of its own, and start the run again with "
                "`resume_from_checkpoint=True`."
            )
        checksum = [position["checksum"] for position in positions]
        with self._progress_lock:
            if updates == len(self.update_records):
                if self.checksum is None:
                    self.checksum, self._checksum_source = checksum, server.url
                if checksum != self.checksum:
                    raise ServerError(
                        f"The vLLM server {server.url} has other weights than {self._checksum_source} after {updates} "
                        "updates. Start all servers with the same model, on the same kind of device and with the "
                        "same --tensor-parallel-size."
                    )
            server.updates = updates

    def update(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """
        Have all servers do an update. Those that are late, or behind, do it before their next job.

        Args:
            record (`dict[str, Any]`):
                The update record: seeds, signs, utilities and learning rate.

        Returns:
            `list[dict[str, Any]]`: What each worker of one server returned; the servers agree.

        Raises:
            [`ServerError`]: If no server did it, or their weights differ afterwards.
        """
        with self._progress_lock:
            current = [server for server in self.servers if server.updates == len(self.update_records)]
            self._append(record)
            self.checksum = None
        results: list[list[dict[str, Any]]] = []

        def update_on(server: Replica) -> None:
            with server.lock:
                # The thread that had it catch up may have done this already, or have lost the server
                if server.updates == len(self.update_records) - 1:
                    self._replay_next(server)
                if server.updates == len(self.update_records):
                    results.append(server.last_update)

        for late in (False, True):  # it takes those that are late if there is no other
            if not results:
                self._on_each([server for server in current if server.late == late], update_on)
        if not results:  # servers that are behind would have to catch up first
            raise self.none_left()
        return results[0]

    def _on_each(self, servers: Sequence[Replica], do: Callable[[Replica], None]) -> None:
        """Do something with each server at the same time. Servers that are lost are left out, unless all are."""

        def attempt(server: Replica) -> None:
            try:
                do(server)
            except ServerLost as error:
                server.lose(error)

        with ThreadPoolExecutor(max(1, len(servers))) as threads:
            list(threads.map(attempt, servers))
        if not any(server.connected for server in self.servers):
            raise self.none_left()

    def export(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """See [`VLLMClient.export`]; from any server that has done all updates."""
        for server in self.servers:
            if server.updates != len(self.update_records):
                continue
            try:
                with server.lock:
                    return server.export(name, like)
            except ServerLost as error:
                server.lose(error)
        raise self.none_left()
