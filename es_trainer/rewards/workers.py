"""Reward functions in a pool of processes: several completions at a time, and a time limit that ends anything."""

import ctypes
import functools
import multiprocessing
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

import pebble
from transformers import TrainerState
from transformers.utils import logging

from .call import Call, Outcome


logger = logging.get_logger(__name__)

PR_SET_PDEATHSIG = 1

_here = False  # in this process, the pool's functions run


class Workers:
    """
    A pool of processes that call functions.

    Functions are sent to them by pickling, once. What cannot be pickled, or not be loaded in another process, such as
    a function defined inside another one, stays outside: see [`~Workers.outside`].

    Processes come from Python's fork server, which knows nothing of this process's GPUs and threads. It imports the
    program's main file, so that file has to begin its work below `if __name__ == "__main__":`.

    Args:
        functions (`Mapping[int, Callable]`):
            Functions by a number of the caller's.
        number (`int`):
            How many processes.
    """

    def __init__(self, functions: Mapping[int, Callable], number: int):
        self._pickled: dict[int, bytes] = {}
        self._outside: dict[int, str] = {}
        for i, function in functions.items():
            try:
                self._pickled[i] = pickle.dumps(function)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                self._outside[i] = str(error)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        self._pool = pebble.ProcessPool(number, initializer=_end_with_the_server, context=context)
        self._loading = self._pool.schedule(_load, [self._pickled]) if self._pickled else None

    @functools.cached_property
    def outside(self) -> dict[int, str]:
        """
        The functions that cannot be called here, and why. It waits for the first worker.

        Raises:
            `RuntimeError`: If workers do not start.
        """
        if self._loading is None:
            return self._outside
        try:
            return self._outside | self._loading.result()
        except (BrokenProcessPool, pebble.ProcessExpired) as error:
            raise RuntimeError(
                "The processes of `reward_workers` do not start; what they printed says why. They import the main file "
                'of the program: everything that it does has to be below `if __name__ == "__main__":`, or the reward '
                "functions in a file of their own, with `reward_workers=0`."
            ) from error

    def submit(self, function: int, calls: Sequence[Call], timeout: float | None) -> "list[Future[Outcome]]":
        """
        Make calls of a function, each in the next process that is free.

        Args:
            function (`int`):
                Its number.
            calls (`Sequence[Call]`):
                What it gets, each time.
            timeout (`float`, *optional*):
                Seconds for each, from when a process takes it. Then the process is ended, and another one started.

        Returns:
            `list[Future]`: Their [`Outcome`]s. They raise `TimeoutError` at the time limit, and
            [`~pebble.ProcessExpired`] if the process ends.
        """
        state = pickle.dumps(calls[0].trainer_state)  # once: it has what was logged, of all steps
        stateless = [replace(call, trainer_state=None) for call in calls]
        return [self._pool.schedule(_run, [self._pickled[function], call, state], timeout=timeout) for call in stateless]


def here() -> bool:
    """Whether this process is one of a pool's."""
    return _here


# In the workers


def _end_with_the_server() -> None:
    """The fork server ends with the program, whatever ends that. So does a worker then, also amid a computation."""
    global _here
    _here = True
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _load(pickled: dict[int, bytes]) -> dict[int, str]:
    """Why functions cannot be loaded, of those for which that is so."""
    reasons = {}
    for i, function in pickled.items():
        try:
            _function(function)
        except Exception as error:  # whatever the function's module raises
            reasons[i] = f"{type(error).__name__}: {error}"
    return reasons


def _run(function: bytes, call: Call, state: bytes) -> Outcome:
    start = time.perf_counter()
    try:
        call.trainer_state = _state(state)
        result = call.run(_function(function))
    except BaseException as error:  # also SystemExit. It is told in words: not every exception can be pickled
        raised, where = f"{type(error).__name__}: {error}", traceback.format_exc()
        return Outcome(None, start, time.perf_counter(), raised=raised, where=where)
    return Outcome(result, start, time.perf_counter(), call.extra, call.metrics)


@functools.lru_cache
def _function(pickled: bytes) -> Callable:
    return pickle.loads(pickled)


@functools.lru_cache(maxsize=1)
def _state(pickled: bytes) -> TrainerState | None:
    return pickle.loads(pickled)
