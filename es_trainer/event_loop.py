"""The event loop in which `async` rewards and tools run."""

import asyncio
import contextlib
import functools
import threading


_asked = threading.Lock()


def event_loop() -> asyncio.AbstractEventLoop:
    """
    One for good, in a thread of its own: connections that functions keep open belong to the loop that they were opened
    in.
    """
    with _asked:  # or threads that ask at the same time would start a loop each
        return _start()


@functools.cache
def _start() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=_run_for_good, args=(loop,), name="es_trainer-event-loop", daemon=True).start()
    return loop


def _run_for_good(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        # Where a task that a function began exits, asyncio ends the loop, too; whoever waits for the task is told
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()
