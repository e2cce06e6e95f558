"""
Jobs dispatched to vLLM servers as these become free. A job of a server that is lost goes to another one, and a server
that nothing is left for helps with a job that takes too long.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

from .vllm_client import Cancelled, ServerError, ServerLost
from .vllm_server_pool import Server, ServerPool


T = TypeVar("T")

# A job takes too long that has taken so many times the median, by its size, of those that are done
TOO_LONG = 2.0


@dataclass(frozen=True)
class Job:
    """
    What a server does in one go.

    Args:
        members (`tuple[int, ...]`):
            Numbers of the members that answer.
        prompts (`range`):
            Numbers of the prompts that each of them completes.
    """

    members: tuple[int, ...]
    prompts: range

    @property
    def size(self) -> int:
        """Prompts of all members."""
        return len(self.members) * len(self.prompts)

    def shares(self, most: int) -> list["Job"]:
        """The same in shares of the prompts, of at most so many."""
        starts = range(0, len(self.prompts), most)
        return [Job(self.members, self.prompts[start : start + most]) for start in starts]


@dataclass(eq=False)
class Attempt:
    """
    A job that a server does.

    Args:
        job ([`Job`]):
            The job.
        server ([`Server`]):
            The server.
        start (`float`):
            When it began.
        helps ([`Attempt`], *optional*):
            The attempt that takes too long, of whose job this is a share.
    """

    job: Job
    server: Server
    start: float
    helps: "Attempt | None" = None
    shares: deque[Job] | None = None  # of the job, for helpers, that none of them does
    answered: list[tuple[Job, Any]] = field(default_factory=list)  # the shares that helpers have done


class JobQueue:
    """
    Jobs for several servers, each with a thread of its own. A job that one server could not finish goes to another.

    Jobs are given in order. If servers are free and fewer jobs are left, those are shared out among the servers, by
    prompts. If none is left, the free servers do a job that takes too long as well, in shares. What is answered first,
    the job or all of its shares, counts; the other is cancelled.

    Args:
        jobs (`Sequence[Job]`):
            The jobs.
        servers (`int`):
            Number of servers.
        splits (`bool`):
            Whether jobs can be shared out.
        repeats (`bool`):
            Whether a job can be done again while it is under way.
    """

    def __init__(self, jobs: Sequence[Job], servers: int, splits: bool, repeats: bool):
        self._waiting = deque(jobs)
        self._present = servers  # that have not left
        self._splits = splits
        self._repeats = repeats
        self._under_way: list[Attempt] = []
        self._unfinished = sum(job.size for job in jobs)  # waiting or under way
        self._times: list[float] = []  # that jobs took, by their size
        self._changed = threading.Condition()

    @property
    def unfinished(self) -> bool:
        """Whether there are jobs that are not done."""
        return self._unfinished > 0

    def get(self, server: Server) -> Attempt | None:
        """The next job for a server, as soon as there is one; `None` when all are done."""
        with self._changed:
            while self._unfinished:
                attempt = self._next(server)
                if attempt is not None:
                    self._under_way.append(attempt)
                    return attempt
                self._changed.wait(self._until_too_long())
        return None

    def task_done(self, attempt: Attempt, result: Any) -> list[tuple[Job, Any]]:
        """Say what came of a job that `get` returned. Returns the jobs that are done by that, with their results."""
        with self._changed:
            if attempt not in self._under_way:
                return []
            self._drop(attempt)
            slow = attempt.helps
            if slow is None:
                self._times.append((time.monotonic() - attempt.start) / attempt.job.size)
                done = [(attempt.job, result)]
            else:
                slow.answered.append((attempt.job, result))
                done = slow.answered if sum(job.size for job, _ in slow.answered) == slow.job.size else []
                if done:
                    self._drop(slow)
                    slow.server.late = True
                    slow.server.cancel()
            self._unfinished -= sum(job.size for job, _ in done)
            self._changed.notify_all()
            return done

    def put_back(self, attempt: Attempt) -> None:
        """Leave a job that `get` returned to another server, if it is not done."""
        with self._changed:
            if attempt in self._under_way:
                self._drop(attempt)
                left = self._waiting if attempt.helps is None else attempt.helps.shares
                left.appendleft(attempt.job)
                self._changed.notify_all()

    def leave(self) -> None:
        """Say that a server takes no more jobs."""
        with self._changed:
            self._present -= 1

    def shutdown(self) -> None:
        """Drop all jobs that are not done."""
        with self._changed:
            self._unfinished = 0
            for attempt in self._under_way:
                attempt.server.cancel()
            self._under_way.clear()
            self._changed.notify_all()

    def _next(self, server: Server) -> Attempt | None:
        free, now = self._present - len(self._under_way), time.monotonic()
        if self._waiting:
            job = self._waiting.popleft()
            if self._splits and len(self._waiting) + 1 < free:
                left = len(job.prompts) + sum(len(other.prompts) for other in self._waiting)
                job, *others = job.shares(-(-left // free))
                self._waiting.extendleft(reversed(others))
            return Attempt(job, server, now)
        for slow in self._to_be_helped():
            if slow.start + self._too_long(slow.job) <= now:
                if slow.shares is None:
                    helpers = self._present - 1
                    slow.shares = deque(slow.job.shares(-(-len(slow.job.prompts) // helpers)))
                return Attempt(slow.shares.popleft(), server, now, helps=slow)
        return None

    def _to_be_helped(self) -> list[Attempt]:
        """Attempts of which not all shares are given to helpers, from the first on."""
        if not (self._repeats and self._times):
            return []
        return [a for a in self._under_way if a.helps is None and (a.shares is None or a.shares)]

    def _too_long(self, job: Job) -> float:
        return TOO_LONG * statistics.median(self._times) * job.size

    def _until_too_long(self) -> float | None:
        """Seconds until a job that is under way takes too long."""
        ends = [attempt.start + self._too_long(attempt.job) for attempt in self._to_be_helped()]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _drop(self, attempt: Attempt) -> None:
        """Forget an attempt, and cancel those that help it."""
        self._under_way.remove(attempt)
        for helper in [helper for helper in self._under_way if helper.helps is attempt]:
            self._under_way.remove(helper)
            helper.server.cancel()


def dispatch(
    replicas: ServerPool, jobs: Sequence[Job], do: Callable[[Job, Server], T], splits: bool, repeats: bool
) -> Iterator[T]:
    """
    Do jobs, each on a server that is free.

    Args:
        replicas ([`ServerPool`]):
            The servers.
        jobs (`Sequence[Job]`):
            The jobs.
        do (`Callable`):
            Does a job, or a share of one, on a server.
        splits (`bool`):
            Whether jobs can be shared out by prompts.
        repeats (`bool`):
            Whether a job can be done again while it is under way.

    Yields:
        What `do` returned, in the order in which jobs end. Together, this is every job once.

    Raises:
        [`ServerError`]: If no server is left.
    """
    waiting = JobQueue(jobs, len(replicas.servers), splits, repeats)
    events: SimpleQueue[tuple[str, Any]] = SimpleQueue()

    def serve(server: Server) -> None:
        with server.lock:
            try:
                if _catches_up(replicas, server, waiting):
                    _run_jobs(server, waiting, do, events)
            except ServerLost as error:
                server.lose(error)
            except Exception as error:
                events.put(("failed", error))
        waiting.leave()
        events.put(("ended", None))

    for server in replicas.servers:
        threading.Thread(target=serve, args=(server,), name=f"es_trainer-{server.url}", daemon=True).start()
    working, left = len(replicas.servers), sum(job.size for job in jobs)
    try:
        while left:
            kind, found = events.get()
            if kind == "failed":
                raise found
            if kind == "ended":
                working -= 1
                if working == 0:
                    raise replicas.none_left()
            else:
                job, result = found
                left -= job.size
                yield result
    finally:
        waiting.shutdown()


def _catches_up(replicas: ServerPool, server: Server, jobs: JobQueue) -> bool:
    """Have a server do what it has missed. Returns `False` if the jobs were done before it had."""
    if not server.connected:
        if not (jobs.unfinished and server.is_up()):
            return False
        replicas.connect(server)
    while jobs.unfinished:
        if replicas.catch_up(server):
            server.late = False
            return True
    return False


def _run_jobs(
    server: Server, jobs: JobQueue, do: Callable[[Job, Server], T], events: "SimpleQueue[tuple[str, Any]]"
) -> None:
    while (attempt := jobs.get(server)) is not None:
        try:
            result = do(attempt.job, server)
        except Cancelled:
            jobs.put_back(attempt)
            continue
        except ServerError:
            jobs.put_back(attempt)
            raise
        server.late = False
        for done in jobs.task_done(attempt, result):
            events.put(("done", done))
