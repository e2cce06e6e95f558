"""
The process that starts and ends those of a [`~es_trainer.rewards.pool.Pool`].

It is run as a file of its own: it imports neither the program's main file nor this package, and has no GPU and no
threads of theirs.
"""

import contextlib
import multiprocessing
import pickle
import signal
import sys
import threading
from functools import partial
from multiprocessing.connection import Connection

import pebble


def serve(program: Connection) -> None:
    """
    Do what the program says, until it has ended.

    Args:
        program (`Connection`):
            It gets, first, a path, modules, a number of processes and what they do when they start. Then it gets
            tasks, each with a number and a time limit, or the number of one that nobody waits for any more. `None` is
            the end. It returns the number of a task with its result, or its exception.
    """
    sys.path[:], modules, processes, initializer = program.recv()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(modules)
    pool = pebble.ProcessPool(processes, initializer=_call, initargs=[initializer], context=context)
    futures: dict[int, pebble.ProcessFuture] = {}
    one_at_a_time = threading.Lock()

    def reply(number: int, future: pebble.ProcessFuture) -> None:
        futures.pop(number, None)
        if future.cancelled():
            return
        error = future.exception()
        if not isinstance(error, TimeoutError | pebble.ProcessExpired | None):
            error = RuntimeError(f"{type(error).__name__}: {error}")  # not every exception can be pickled
        with one_at_a_time, contextlib.suppress(BrokenPipeError):  # the program may have ended
            program.send((number, future.result() if error is None else None, error))

    with contextlib.suppress(EOFError, ConnectionResetError):  # of a program that has ended
        while (message := program.recv()) is not None:
            number, task, timeout = message
            if task is not None:
                futures[number] = pool.schedule(_call, [task], timeout=timeout)
                futures[number].add_done_callback(partial(reply, number))
            elif number in futures:
                futures[number].cancel()
    pool.stop()
    pool.join()


def _call(pickled: bytes) -> bytes:
    function, args = pickle.loads(pickled)
    return pickle.dumps(function(*args))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, which then ends this process
    pebble.CONSTS.term_timeout = 0.5  # seconds that a process has to end by itself
    serve(Connection(int(sys.argv[1])))
