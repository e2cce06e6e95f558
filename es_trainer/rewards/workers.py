"""Reward functions in a pool of processes: several completions at a time, and a time limit that ends anything."""

import functools
import pickle
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

import dill
from transformers import TrainerState

from .call import Call, Outcome
from .pool import Pool


# In a worker: its functions, and why others cannot be loaded
_functions: dict[int, Callable] = {}
_reasons: dict[int, str] = {}


class Workers:
    """
    A pool of processes that call reward functions.

    Functions are sent to them by [dill](https://dill.readthedocs.io), which `datasets` uses, too: those of the main
    file, of a notebook or inside other functions are copied with all that they refer to. Each process has functions of
    its own: what they change stays there. What cannot be sent stays outside: see [`~Workers.outside`].

    Args:
        functions (`Mapping[int, Callable]`):
            Functions by a number of the caller's.
        number (`int`):
            How many processes.
    """

    def __init__(self, functions: Mapping[int, Callable], number: int):
        pickled: dict[int, bytes] = {}
        self._outside: dict[int, str] = {}
        for i, function in functions.items():
            try:
                pickled[i] = dill.dumps(function, recurse=True)
            except Exception as error:  # of dill, or of what the function refers to
                self._outside[i] = f"{type(error).__name__}: {error}"
        self._pool = Pool(number, _begin, [pickled], [__name__])
        self._loading = self._pool.submit(_reasons_here)  # processes start now, while models are loaded

    @functools.cached_property
    def outside(self) -> dict[int, str]:
        """
        The functions that cannot be called here, and why. It waits for the first process.

        Raises:
            `RuntimeError`: If processes do not start.
        """
        try:
            return self._outside | self._loading.result()
        except Exception as error:
            raise RuntimeError("The processes for reward functions do not start. They have printed why.") from error

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
        return [self._pool.submit(_run, [function, call, state], timeout) for call in stateless]


def here() -> bool:
    """Whether this process is one of a pool's."""
    return bool(_functions)


# In the workers


def _begin(pickled: dict[int, bytes]) -> None:
    for i, function in pickled.items():
        try:
            _functions[i] = dill.loads(function)
        except Exception as error:  # whatever the function's module raises
            _reasons[i] = f"{type(error).__name__}: {error}"


def _reasons_here() -> dict[int, str]:
    return _reasons


def _run(function: int, call: Call, state: bytes) -> Outcome:
    start = time.perf_counter()
    try:
        call.trainer_state = _state(state)
        result = call.run(_functions[function])
    except BaseException as error:  # also SystemExit. It is told in words: not every exception can be pickled
        raised, where = f"{type(error).__name__}: {error}", traceback.format_exc()
        return Outcome(None, start, time.perf_counter(), raised=raised, where=where)
    return Outcome(result, start, time.perf_counter(), call.extra, call.metrics)


@functools.lru_cache(maxsize=1)
def _state(pickled: bytes) -> TrainerState | None:
    return pickle.loads(pickled)
