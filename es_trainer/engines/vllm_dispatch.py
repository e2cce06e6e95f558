"""Jobs dispatched to vLLM servers as these become free. A job of a server that is lost goes to another one."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, TypeVar

from .vllm_client import ServerError, ServerLost
from .vllm_replicas import Replica, Replicas


T = TypeVar("T")


class JobQueue:
    """
    Numbered jobs for several threads. A job that one thread could not finish goes to another.

    Args:
        count (`int`):
            Number of jobs.
    """

    def __init__(self, count: int):
        self._waiting = deque(range(count))
        self._unfinished = count  # waiting or under way
        self._changed = threading.Condition()

    @property
    def unfinished(self) -> bool:
        """Whether there are jobs that are not done."""
        return self._unfinished > 0

    def get(self) -> int | None:
        """The next job, as soon as there is one; `None` when all are done."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._unfinished <= 0)
            return self._waiting.popleft() if self._unfinished > 0 else None

    def task_done(self) -> None:
        """Say that a job that `get` returned is done."""
        with self._changed:
            self._unfinished -= 1
            self._changed.notify_all()

    def put_back(self, job: int) -> None:
        """Leave a job that `get` returned to another thread."""
        with self._changed:
            self._waiting.appendleft(job)
            self._changed.notify_all()

    def shutdown(self) -> None:
        """Drop all jobs that are not done."""
        with self._changed:
            self._unfinished = 0
            self._changed.notify_all()


def dispatch(replicas: Replicas, count: int, do: Callable[[int, Replica], T]) -> Iterator[T]:
    """
    Do jobs, each on a server that is free.

    Args:
        replicas ([`Replicas`]):
            The servers.
        count (`int`):
            Number of jobs.
        do (`Callable`):
            Does a job, given its number and the server.

    Yields:
        What `do` returned, in the order in which jobs end.

    Raises:
        [`ServerError`]: If no server is left.
    """
    jobs = JobQueue(count)
    events: SimpleQueue[tuple[str, Any]] = SimpleQueue()

    def serve(server: Replica) -> None:
        with server.lock:
            try:
                if _catches_up(replicas, server, jobs):
                    _run_jobs(server, jobs, do, events)
            except ServerLost as error:
                server.lose(error)
            except Exception as error:
                events.put(("failed", error))
        events.put(("ended", None))

    for server in replicas.servers:
        threading.Thread(target=serve, args=(server,), name=f"es_trainer-{server.url}", daemon=True).start()
    working = len(replicas.servers)
    try:
        while count:
            kind, result = events.get()
            if kind == "failed":
                raise result
            if kind == "ended":
                working -= 1
                if working == 0:
                    raise replicas.none_left()
            else:
                count -= 1
                yield result
    finally:
        jobs.shutdown()


def _catches_up(replicas: Replicas, server: Replica, jobs: JobQueue) -> bool:
    """Have a server do the updates that it has missed. Returns `False` if the jobs were done before it had."""
    if server.updates is None:
        if not (jobs.unfinished and server.is_up()):
            return False
        replicas.connect(server)
    while jobs.unfinished:
        if replicas.catch_up(server):
            return True
    return False


def _run_jobs(
    server: Replica, jobs: JobQueue, do: Callable[[int, Replica], T], events: "SimpleQueue[tuple[str, Any]]"
) -> None:
    while (job := jobs.get()) is not None:
        try:
            events.put(("done", do(job, server)))
        except ServerError:
            jobs.put_back(job)
            raise
        jobs.task_done()
