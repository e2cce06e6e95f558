"""Processes that call functions, with time limits that end anything."""

import contextlib
import itertools
import multiprocessing
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


SERVER = Path(__file__).with_name("pool_server.py")


class Pool:
    """
    A pool of processes.

    A process of its own starts them and ends them, so they import only what they need: the main file of the program
    needs no `if __name__ == "__main__":`, and may be a notebook. They end with this object, and with the program,
    whatever ends it.

    Args:
        number (`int`):
            How many processes.
        initializer (`Callable`), initargs (`Sequence`):
            Called in each process when it starts, which no time limit counts.
        modules (`Sequence[str]`):
            Modules that are imported once for all processes.
    """

    def __init__(self, number: int, initializer: Callable, initargs: Sequence[Any], modules: Sequence[str]):
        self._server, there = multiprocessing.Pipe()
        command = [sys.executable, "-P", SERVER, str(there.fileno())]
        process = subprocess.Popen(command, pass_fds=[there.fileno()])
        there.close()
        self._server.send((sys.path, list(modules), number, pickle.dumps((initializer, initargs))))
        self._numbers = itertools.count()
        self._futures: dict[int, Future] = {}
        self._one_at_a_time = threading.Lock()
        threading.Thread(target=_receive, args=[self._server, self._futures, process], daemon=True).start()
        weakref.finalize(self, _stop, self._server)

    def submit(self, function: Callable, args: Sequence[Any] = (), timeout: float | None = None) -> Future:
        """
        Call a function in the next process that is free.

        Args:
            function (`Callable`), args (`Sequence`):
                What can be pickled.
            timeout (`float`, *optional*):
                Seconds, from when a process takes it. Then the process is ended, and another one started. The same
                happens if the future is cancelled.

        Returns:
            `Future`: The result. It raises `TimeoutError` at the time limit, [`~pebble.ProcessExpired`] if the process
            ends, and `BrokenProcessPool` if all of them do.
        """
        number, future = next(self._numbers), Future()
        self._futures[number] = future
        self._send(number, pickle.dumps((function, args)), timeout)
        future.add_done_callback(lambda done: self._send(number, None, None) if done.cancelled() else None)
        return future

    def _send(self, *message: Any) -> None:
        with self._one_at_a_time:
            self._server.send(message)


def _stop(server: Connection) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has ended
        server.send(None)


def _receive(server: Connection, futures: dict[int, Future], process: subprocess.Popen) -> None:
    while True:
        try:
            number, result, error = server.recv()
        except (EOFError, ConnectionResetError):
            break
        _settle(futures.pop(number), result, error)
    process.wait()
    for future in futures.values():
        _settle(future, None, BrokenProcessPool(f"Process {process.pid} ended with status {process.returncode}."))


def _settle(future: Future, result: bytes | None, error: Exception | None) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(pickle.loads(result))
    else:
        future.set_exception(error)
