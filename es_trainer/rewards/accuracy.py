import functools
import logging
from typing import TYPE_CHECKING

from .scope import time_limit
from .text import completion_text


if TYPE_CHECKING:
    from .caller import Caller


# A hopeless answer is given up by math-verify after 5 to 10 seconds. This is for what it cannot interrupt
SECONDS = 60


@time_limit(SECONDS, reward=0.0)
def accuracy_reward(
    completions: list[str | list[dict[str, str]]], solution: list[str], **kwargs
) -> list[float | None]:
    r"""
    TRL's [`~trl.rewards.accuracy_reward`], in a process of its own: whether math-verify finds the answer equal to the
    solution.

    TRL has to do without math-verify's time limits outside of the main thread. There, a completion such as
    `\boxed{9^{9^9}}` would stop the program for good, and the same may happen wherever math-verify computes what
    cannot be interrupted. A process of its own can always be ended. `reward_workers` of them check answers at the same
    time; one does where that is 0.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions to score, as plain strings or in the conversational format. The answer has to be LaTeX, best in
            `\boxed{}`.
        solution (`list[str]`):
            Dataset column with one solution per completion, best as `\boxed{...}` or `$...$`.
        **kwargs:
            The other dataset columns and whatever else the trainer passes. Not used.

    Returns:
        `list[float | None]`:
            For each completion 1.0 if the answer is right, 0.0 if it is wrong, missing or takes too long to check, and
            `None` if the solution cannot be parsed.
    """
    # Imported where they are used: tasks name this function, and need no torch
    from .call import Call
    from .workers import here

    if here():
        return _grade(completions, solution)
    rows = [{"prompt": "", "solution": reference} for reference in solution]
    call = Call("accuracy_reward", rows, completions, [[]] * len(completions), None)
    returned, _ = _caller().begin({0: call})()
    return [reward for (reward,) in returned[0].results]


@functools.cache
def _caller() -> "Caller":
    """For those who call the function themselves."""
    from .caller import Caller, CallSettings

    return Caller([accuracy_reward], ["accuracy_reward"], [False], [0], CallSettings())


def _grade(completions: list[str | list[dict[str, str]]], solution: list[str]) -> list[float | None]:
    from trl.rewards import accuracy_reward as grade

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would report every answer that takes too long
    return grade([[{"role": "assistant", "content": completion_text(c)}] for c in completions], solution)
