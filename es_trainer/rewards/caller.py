"""Calls reward functions: in the thread that asks, in an event loop or in a pool of processes."""

import asyncio
import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, TypeVar

import pebble
from torch import nn
from transformers.utils import logging

from ..event_loop import event_loop
from .call import Call, Outcome, Retries
from .workers import Workers


if TYPE_CHECKING:
    from ..config import ESConfig


T = TypeVar("T")

logger = logging.get_logger(__name__)

PATIENCE = 60.0  # seconds that a function takes before that is warned of


@dataclass(frozen=True)
class CallSettings:
    """
    How reward functions are called. See [`ESConfig`], whose fields begin with `reward_`.

    Args:
        workers (`int`, *optional*, defaults to `0`):
            Completions that are scored at the same time, each by calls of its own; 0 for one call with all of them.
        timeout (`float`, *optional*):
            Seconds for a call.
        retries ([`Retries`], *optional*):
            When to call a function again.
    """

    workers: int = 0
    timeout: float | None = None
    retries: Retries = field(default_factory=Retries)

    @classmethod
    def of(cls, args: "ESConfig") -> "CallSettings":
        """
        Those of a config.

        Raises:
            `ValueError`: If a name in `reward_retry_on` is not that of an exception.
        """
        names = args.reward_retry_on or []
        exceptions = tuple(_exception(name) for name in names)
        return cls(args.reward_workers, args.reward_timeout, Retries(exceptions, args.reward_retries))


@dataclass
class Returned:
    """
    What came of a call.

    Args:
        results (`list`):
            What the function returned: for all completions, or for each of them.
        start (`float`), end (`float`):
            When it ran, on the clock of `time.perf_counter`.
        timed_out (`list[bool]`, *optional*):
            Whether each of them took longer than the time limit. Empty if there is none.
    """

    results: list[Any]
    start: float
    end: float
    timed_out: list[bool] = field(default_factory=list)


class Caller:
    """
    Calls reward functions.

    Args:
        functions (`list[Callable]`):
            The functions. The list may be changed until the first call.
        names (`list[str]`):
            Under which messages speak of them.
        of_sets (`Sequence[bool]`):
            Of each, whether it returns one number for all completions of a call.
        pooled (`Sequence[int]`):
            Those that may be called in another process, if they can be sent there.
        settings ([`CallSettings`]):
            How to call them.
    """

    def __init__(
        self,
        functions: list[Callable],
        names: list[str],
        of_sets: Sequence[bool],
        pooled: Sequence[int],
        settings: CallSettings,
    ):
        self._functions = functions
        self._names = names
        self._of_sets = of_sets
        self._settings = settings
        self._patience = [PATIENCE] * len(functions)
        self._warned = [False] * len(functions)
        self._running: dict[Future, None] = {}  # in the order of the calls
        # Calls of an async function, one at a time in their order, or as many at a time as there are workers
        self._turns = [asyncio.Semaphore(1 if of_set else max(1, settings.workers)) for of_set in of_sets]
        sent = {i: functions[i] for i in pooled if self._is_for_a_process(functions[i])}
        self._workers = Workers(sent, max(1, settings.workers)) if sent else None
        self._in_workers = set(sent)

    def _is_for_a_process(self, function: Callable) -> bool:
        wanted = self._settings.workers > 0 or hasattr(unwrapped(function), "reward_timeout")
        return wanted and not (isinstance(function, str | nn.Module) or is_async(function))

    def check(self) -> None:
        """
        Wait until workers have what they need, and say which functions they cannot call.

        Raises:
            `RuntimeError`: If workers do not start.
        """
        if self._workers is None:
            return
        for i, reason in self._workers.outside.items():
            if i in self._in_workers:
                self._in_workers.discard(i)
                logger.warning(
                    f"Reward function {self._names[i]!r} cannot be sent to another process ({reason}), so it is "
                    "called in this one with all completions of a member, one call after another, and no time limit "
                    "ends it. What cannot be sent it may create itself, when it is called first."
                )

    def call(self, name: str, **of_completions: Any) -> Call:
        """A call of the function of this name. See [`Call`] for the rest."""
        return Call(name, retries=self._settings.retries, **of_completions)

    def begin(self, calls: dict[int, Call]) -> Callable[[], tuple[dict[int, Returned], float]]:
        """
        Call functions, and leave those running that do not need this thread.

        Args:
            calls (`dict[int, Call]`):
                By number of the function.

        Returns:
            `Callable`: Waits for what is running. It returns what came of each call, and the seconds that functions
            ran beside nothing else.
        """
        self.check()
        start = time.perf_counter()
        waiting = {i: self._await(i, call) for i, call in calls.items() if self._needs_no_thread(i)}
        running = None
        if waiting:
            running = asyncio.run_coroutine_threadsafe(_together(list(waiting.values())), event_loop())
            self._running[running] = None
            running.add_done_callback(lambda done: self._running.pop(done, None))
        try:
            returned = {i: self._call(i, call) for i, call in calls.items() if i not in waiting}
        except BaseException:
            if running is not None:
                running.cancel()
            raise
        end = time.perf_counter()

        def finish() -> tuple[dict[int, Returned], float]:
            if running is None:
                return returned, end - start
            try:
                others = running.result()
            finally:
                running.cancel()
            first, last = min(one.start for one in others), max(one.end for one in others)
            return returned | dict(zip(waiting, others, strict=True)), end - start + max(0.0, last - max(first, end))

        return finish

    def cancel(self) -> None:
        """Cancel the functions that are still running: nobody will ask for their rewards."""
        for running in reversed(list(self._running)):  # or the next would begin when the one before it ends
            running.cancel()

    def _needs_no_thread(self, i: int) -> bool:
        return i in self._in_workers or is_async(self._functions[i])

    def _call(self, i: int, call: Call) -> Returned:
        start = time.perf_counter()
        try:
            with self._watched(i, [call]):
                return Returned([call.run(self._functions[i])], start, time.perf_counter())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also SystemExit, of code that the model wrote and the function executes
            raise self._failure(i, f"raised {type(error).__name__}: {error}") from error

    async def _await(self, i: int, call: Call) -> Returned:
        """Call a function with all completions, or with each of them, which is one call for who logs."""
        apart = not self._of_sets[i] and (self._settings.workers > 0 or i in self._in_workers)
        parts = call.of_each_completion() if apart else [call]
        unfinished = list(parts)

        async def finished(part: Call, outcome: Awaitable[Outcome]) -> Outcome:
            try:
                return await outcome
            finally:
                unfinished.remove(part)

        begun = self._in_pool(i, parts) if i in self._in_workers else [self._in_loop(i, part) for part in parts]
        with self._watched(i, unfinished):
            outcomes = await _together([finished(part, outcome) for part, outcome in zip(parts, begun, strict=True)])
        call.take_logs(outcomes)
        return Returned(
            [outcome.result for outcome in outcomes],
            min(outcome.start for outcome in outcomes),
            max(outcome.end for outcome in outcomes),
            [outcome.timed_out for outcome in outcomes] if self._limit(i) is not None else [],
        )

    def _in_pool(self, i: int, parts: Sequence[Call]) -> list[Coroutine[Any, Any, Outcome]]:
        async def outcome(part: Call, future: asyncio.Future[Outcome]) -> Outcome:
            try:
                found = await future
            except TimeoutError:
                return self._timed_out(i, part)
            except pebble.ProcessExpired as error:
                raise self._failure(i, f"ended its process with status {error.exitcode} for {part}") from error
            except Exception as error:  # of the pool, or of pickling what is sent
                raise self._failure(i, f"could not be called in a process: {type(error).__name__}: {error}") from error
            if found.raised is not None:
                failure = self._failure(i, f"raised {found.raised}")
                failure.add_note(found.where)
                raise failure
            return found

        # All of them are in the pool's queue before those of the next call
        futures = self._workers.submit(i, parts, self._limit(i))
        return [outcome(part, asyncio.wrap_future(future)) for part, future in zip(parts, futures, strict=True)]

    async def _in_loop(self, i: int, part: Call) -> Outcome:
        async with self._turns[i]:
            start = time.perf_counter()
            try:
                async with asyncio.timeout(self._limit(i)) as clock:
                    result = await part.run_async(self._functions[i])
            except GeneratorExit:
                raise
            except BaseException as error:
                if isinstance(error, TimeoutError) and clock.expired():
                    return self._timed_out(i, part)
                if asyncio.current_task().cancelling():
                    raise
                raise self._failure(i, f"raised {type(error).__name__}: {error}") from error
            return Outcome(result, start, time.perf_counter(), part.extra, part.metrics)

    def _limit(self, i: int) -> float | None:
        return getattr(unwrapped(self._functions[i]), "reward_timeout", self._settings.timeout)

    def _timed_out(self, i: int, part: Call) -> Outcome:
        reward = getattr(unwrapped(self._functions[i]), "reward_on_timeout", None)
        limit, end = self._limit(i), time.perf_counter()
        if not self._warned[i]:
            self._warned[i] = True
            counts = "does not apply to it" if reward is None else f"counts as {reward}"
            logger.warning(
                f"Reward function {self._names[i]!r} took more than {limit} seconds for {part}, and {counts}. (Shown "
                f"once. `rewards/{self._names[i]}/timed_out` is the share of such calls.)"
            )
        result = reward if self._of_sets[i] else [reward] * len(part.completions)
        return Outcome(result, end - limit, end, timed_out=True)

    def _failure(self, i: int, what: str) -> RuntimeError:
        return RuntimeError(f"Reward function {self._names[i]!r} {what}")

    @contextlib.contextmanager
    def _watched(self, i: int, unfinished: Sequence[Call]) -> Iterator[None]:
        """Inside, a warning tells when the function takes longer than it ever has, and more than a minute."""
        done = threading.Event()
        start = time.monotonic()

        def watch() -> None:
            while not done.wait(self._patience[i] - (time.monotonic() - start)):
                of = f" for {unfinished[0]}" if unfinished else ""
                logger.warning(
                    f"Reward function {self._names[i]!r} has been running for {time.monotonic() - start:.0f} seconds"
                    f"{of}, and training waits for it. If it hangs, give it a time limit: `reward_timeout` with "
                    "`reward_workers`. (Shown again after twice as long.)"
                )
                self._patience[i] *= 2

        threading.Thread(target=watch, name="es_trainer-reward-watch", daemon=True).start()
        try:
            yield
        finally:
            done.set()


async def _together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them return; if one raises, the others are cancelled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def is_async(function: Callable) -> bool:
    """Whether what a function returns has to be awaited."""
    function = unwrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def unwrapped(function: Callable) -> Callable:
    """What a `functools.partial` is of."""
    return unwrapped(function.func) if isinstance(function, functools.partial) else function


def _exception(name: str) -> type[Exception]:
    try:
        found = resolve_name(name if "." in name else f"builtins:{name}")
    except (ImportError, AttributeError, ValueError) as error:
        found = error
    if not (isinstance(found, type) and issubclass(found, Exception)):
        raise ValueError(
            f"`reward_retry_on` has {name!r}, which is not the name of an exception ({found!r}): give a built-in one, "
            "such as 'TimeoutError', or one with its module, such as 'httpx.HTTPStatusError'."
        )
    return found
