"""What the processes of a run share out and tell each other. Weights are not among it."""

import atexit
import functools
import itertools
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store


T = TypeVar("T")

# How long a process waits for others, which have members to evaluate and rewards to wait for. The `ddp_timeout` of the
# run's process group is for transfers, which take seconds. A process that ends is noticed at once.
PATIENCE = timedelta(days=1)

_queue_numbers = itertools.count()  # the same on all processes, which make the same queues in the same order


class ProcessError(RuntimeError):
    """Another process failed, was lost, or does not agree with this one."""


class Queue:
    """
    Items `0, 1, ..., size - 1`, each of which one process takes: whoever is done takes the next ones.

    To be used as a context: an error inside ends the queue for all processes, so that none begins what is in vain.

    Args:
        size (`int`):
            Number of items.
        store (`torch.distributed.Store`, *optional*):
            Key-value store of the process group. `None` if there is one process.
        group_size (`int`, *optional*, defaults to `1`):
            Processes that take the same items: the first `group_size`, the next, and so on.
    """

    def __init__(self, size: int, store: "dist.Store | None" = None, group_size: int = 1):
        self.size = size
        self._store = store
        self._taken = 0
        self._key = f"es_trainer/queue/{next(_queue_numbers)}"
        self._group, self._rank = divmod(dist.get_rank(), group_size) if store is not None else (0, 0)
        self._group_size = group_size
        self._turns = 0  # of the group

    def take(self, count: int = 1) -> range:
        """The next items, at most `count`; none if there are no more."""
        if self._rank > 0:
            return self._hear()
        end = self._add(count)
        taken = range(min(end - count, self.size), min(end, self.size))
        self._say(taken)
        return taken

    def __enter__(self) -> "Queue":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._add(self.size)
            if self._rank == 0:
                self._say(range(0))
        if self._store is not None:
            self._tick_off(self._key, dist.get_world_size())

    def _say(self, taken: range) -> None:
        """Tell the others of the group what the first of them has taken."""
        if self._group_size > 1:
            self._store.set(self._turn(), f"{taken.start} {taken.stop}")

    def _hear(self) -> range:
        turn = self._turn()
        try:
            self._store.wait([turn], PATIENCE)
            start, stop = self._store.get(turn).split()
        except RuntimeError as error:
            raise _lost(error) from error
        self._tick_off(turn, self._group_size - 1)
        return range(int(start), int(stop))

    def _tick_off(self, key: str, count: int) -> None:
        """This process is done with a key of the store. The last of `count` deletes it."""
        done = f"{key}/done"
        try:
            if self._store.add(done, 1) == count:
                self._store.delete_key(key)
                self._store.delete_key(done)
        except RuntimeError as error:
            raise _lost(error) from error

    def _turn(self) -> str:
        self._turns += 1
        return f"{self._key}/{self._group}/{self._turns}"

    def _add(self, count: int) -> int:
        if self._store is None:
            self._taken += count
            return self._taken
        try:
            return self._store.add(self._key, count)
        except RuntimeError as error:
            raise _lost(error) from error


class Processes:
    """The processes of a run, of which this is one; all of them call the same methods in the same order."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1
        self._store = _get_default_store() if self.count > 1 else None
        self._group = _numbers_group(dist.group.WORLD) if self.count > 1 else None
        if together:
            atexit.unregister(_leave)  # of a trainer before this one
            atexit.register(_leave)

    def queue(self, size: int, group_size: int = 1) -> Queue:
        """A new queue of `size` items, each for a group of processes."""
        return Queue(size, self._store, group_size)

    def on_first(self, work: Callable[[], T]) -> T:
        """Do something on process 0 and tell all processes what came of it."""
        (result, *_) = self.exchange(lambda: work() if self.rank == 0 else None)
        return result

    def exchange(self, work: Callable[[], T]) -> list[T]:
        """
        Do something on every process and tell all of them what came of it.

        Args:
            work (`Callable`):
                Called without arguments; what it returns is pickled.

        Returns:
            `list`: what `work` returned on each process, by rank.

        Raises:
            `Exception`: what `work` raised on this process.
            `ProcessError`: if it raised on another one, or a process is gone.
        """
        if self.count == 1:
            return [work()]
        value = failure = None
        try:
            value = work()
        except Exception as error:
            failure = error
        report = None if failure is None else "".join(traceback.format_exception(failure)).rstrip()
        replies: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(replies, (value, report), group=self._group)
        except RuntimeError as error:
            raise failure or _lost(error) from error
        if failure is not None:
            raise failure
        for rank, (_, report) in enumerate(replies):
            if report is not None:
                raise ProcessError(f"Process {rank} failed, so all processes end here. What it raised:\n{report}")
        return [value for value, _ in replies]

    def agree(self, facts: dict[str, Any]) -> None:
        """
        Compare what has to be the same on all processes.

        Args:
            facts (`dict[str, Any]`):
                Names, and values that can be compared and printed.

        Raises:
            `ProcessError`: if a process has another value than process 0; says which, and for which names.
        """
        first, *others = self.exchange(lambda: facts)
        found = [
            f"{name} is {other.get(name)!r} on process {rank}, but {first.get(name)!r} on process 0"
            for rank, other in enumerate(others, 1)
            for name in dict.fromkeys([*first, *other])
            if first.get(name) != other.get(name)
        ]
        if found:
            raise ProcessError(
                f"The processes of a run must be alike, but {'; '.join(found)}. Start all of them with the same "
                "script, arguments, data and environment."
            )

    def agree_if_several(self, facts: Callable[[], dict[str, Any]]) -> None:
        """Compare facts that take time to find, which one process alone has no use for; see `agree`."""
        if self.count > 1:
            self.agree(facts())

    def broadcast(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        """Overwrite the tensors with those of process 0, by way of a device that can send them."""
        if self.count > 1:
            for tensor in tensors:
                there = tensor.to(device)
                dist.broadcast(there, src=0)
                tensor.copy_(there)

    def before_leaving(self, work: Callable[[], None]) -> None:
        """Do something when the program ends, while processes can still be reached."""
        _before_leaving.append(work)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.exchange(lambda: None)


@functools.cache
def _numbers_group(world: "dist.ProcessGroup") -> "dist.ProcessGroup":
    """
    All processes, for what they tell each other: from CPU to CPU, and patiently. The run's own group may be NCCL's,
    which ends the program when a process waits longer than `ddp_timeout`.
    """
    return dist.new_group(backend="gloo", timeout=PATIENCE)


_before_leaving: list[Callable[[], None]] = []


def _leave() -> None:
    for work in _before_leaving:
        work()
    # A thread of gloo that still holds tensors of the last exchange needs the interpreter to let go of them. If that
    # is gone first, the thread aborts the process.
    _numbers_group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(0.2)  # as others, like DeepSpeed, hold the group and keep its threads from ending


def _lost(error: Exception) -> ProcessError:
    return ProcessError(
        "The connection to another process is lost: it was killed or crashed, or a machine cannot be reached. What "
        "that process printed last may say why. Start the run again with `resume_from_checkpoint=True` to go on from "
        f"the last checkpoint. ({type(error).__name__}: {error})"
    )
