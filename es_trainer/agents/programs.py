"""Programs that run at the same time, each with an endpoint of its own."""

import asyncio
import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from ..rewards.caller import is_async
from .session import Endpoint


logger = logging.get_logger(__name__)

AgentFunc = Callable[[dict[str, Any], Endpoint], Any]
GRACE = 2.0  # seconds for threads to end after they were stopped


class ProgramStopped(BaseException):
    """Raised inside of a program whose time is over."""


@dataclass(eq=False)
class Program:
    """
    One call of the function.

    Args:
        example (`dict[str, Any]`):
            The dataset's row.
        endpoint ([`Endpoint`]):
            Where it finds its model.
    """

    example: dict[str, Any]
    endpoint: Endpoint
    result: Any = None
    error: BaseException | None = None
    started: float = 0.0
    stopped: bool = False
    _thread: threading.Thread | None = None
    _future: Future | None = None
    _done: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """End it, as far as a thread can be ended."""
        self.stopped = True
        if self._future is not None:
            self._future.cancel()
        elif self._thread is not None and self._thread.ident is not None and self._thread.is_alive():
            # Takes effect when the thread is back in Python: calls of the model return at once, as their session is
            # closed
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread.ident), ctypes.py_object(ProgramStopped)
            )


class Programs:
    """
    Calls a function for many examples.

    Args:
        function (`Callable`):
            `function(example, endpoint)`, which may be async.
        concurrency (`int`):
            Most programs that run at the same time.
        timeout (`float`, *optional*):
            Seconds after which a program is stopped.
        errors (`str`):
            What happens if a program raises: `"raise"`, or `"none"` to go on without it.

    Attributes:
        ended (`Callable`):
            Called with each program that has ended, in any thread.
    """

    ended: Callable[[Program], None]

    def __init__(self, function: AgentFunc, concurrency: int, timeout: float | None, errors: str):
        self.function = function
        self.concurrency = concurrency
        self.timeout = timeout
        self.errors = errors
        self.waiting: deque[Program] = deque()
        self.running: set[Program] = set()
        self.started: list[Program] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def start(self) -> None:
        """Start as many programs as may run."""
        while self.waiting and len(self.running) < self.concurrency:
            program = self.waiting.popleft()
            self.running.add(program)
            self.started.append(program)
            program.started = time.monotonic()
            if is_async(self.function):
                program._future = asyncio.run_coroutine_threadsafe(self._run_async(program), self._event_loop())
            else:
                name = f"es_trainer-agent-{program.endpoint.model}"
                program._thread = threading.Thread(target=self._run, args=(program,), name=name, daemon=True)
                program._thread.start()

    def overdue(self) -> list[Program]:
        """Programs whose time is over."""
        if self.timeout is None:
            return []
        return [program for program in self.running if time.monotonic() - program.started >= self.timeout]

    def patience(self) -> float | None:
        """Seconds until the time of a program is over; `None` if that never happens."""
        if self.timeout is None or not self.running:
            return None
        first = min(program.started for program in self.running)
        return max(0.0, first + self.timeout - time.monotonic())

    def finish(self, program: Program) -> None:
        """
        Take note that a program has ended, or was stopped.

        Raises:
            `RuntimeError`: If it has raised, and `errors` is `"raise"`.
        """
        self.running.discard(program)
        if program.stopped:
            return
        if program.error is None and not program.endpoint.has_called:
            program.error = RuntimeError(
                "it returned without having asked the model for anything. Point its client to `endpoint.base_url`, "
                "with `endpoint.api_key` and `endpoint.model`"
            )
        if program.error is not None and self.errors == "raise":
            raise RuntimeError(
                f"`agent_func` {name_of(self.function)!r} failed for {program.endpoint.model}: "
                f"{type(program.error).__name__}: {program.error}. Set agent_errors='none' to go on without it."
            ) from program.error

    def close(self) -> None:
        """Start no more programs, and let those that run end: their sessions are closed. After a while, stop them."""
        self.waiting.clear()
        if _running(self.started, GRACE):
            for program in _running(self.started, 0.0):
                program.stop()
        left = _running(self.started, GRACE)
        if left:
            logger.warning(
                f"{len(left)} programs of `agent_func` go on in their threads after they were stopped, for instance "
                f"that of {left[0].endpoint.model}: Python cannot end a thread that waits. Give what it waits for a "
                "time limit, or run it by `endpoint.run`, whose subprocesses are killed."
            )
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join()
            self._loop.close()
            self._loop = None

    def _run(self, program: Program) -> None:
        try:
            program.result = self.function(program.example, program.endpoint)
        except BaseException as error:  # also SystemExit, of code that the model wrote and the program executes
            program.error = error
        finally:
            program._done.set()
            self.ended(program)

    async def _run_async(self, program: Program) -> None:
        try:
            program.result = await self.function(program.example, program.endpoint)
        except BaseException as error:
            program.error = error
        finally:
            program._done.set()
            self.ended(program)

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._loop_thread = threading.Thread(
                target=self._loop.run_forever, name="es_trainer-async-agents", daemon=True
            )
            self._loop_thread.start()
        return self._loop


def _running(programs: list[Program], patience: float) -> list[Program]:
    """Those that have not ended after some seconds."""
    deadline = time.monotonic() + patience
    return [program for program in programs if not program._done.wait(max(0.0, deadline - time.monotonic()))]


def name_of(function: Callable) -> str:
    """Under which name a function's rewards are logged."""
    return getattr(function, "__name__", type(function).__name__)
