import contextlib
import json
import subprocess
import sys
import threading

from .text import completion_text


# A hopeless answer is given up by math-verify after 5 to 10 seconds. This is for what it cannot interrupt
CPU_SECONDS = 60

_lock = threading.Lock()
_grader: subprocess.Popen | None = None


def accuracy_reward(
    completions: list[str | list[dict[str, str]]], solution: list[str], **kwargs
) -> list[float | None]:
    r"""
    TRL's [`~trl.rewards.accuracy_reward`], in a process of its own: whether math-verify finds the answer equal to the
    solution.

    TRL has to do without math-verify's time limits outside of the main thread. There, a completion such as
    `\boxed{9^{9^9}}` would stop the program for good, and the same may happen wherever math-verify computes what
    cannot be interrupted. A process of its own can always be ended.

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
    with _lock:
        return [
            _grade(completion_text(completion), reference)
            for completion, reference in zip(completions, solution, strict=True)
        ]


def _grade(completion: str, solution: str) -> float | None:
    global _grader
    # Only a grader that has answered is used again: one that was interrupted would give the answer before next time
    grader, _grader = _grader or _start(), None
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps([completion, solution]), file=grader.stdin, flush=True)
    answer = grader.stdout.readline()
    if answer:
        _grader = grader
        return json.loads(answer)
    status = grader.wait()
    if status > 0:
        raise RuntimeError(
            f"The process that compares answers ended with status {status}; it printed why. Is math-verify installed? "
            "`pip install math-verify` installs it."
        )
    return 0.0  # a signal ended it: the time limit, or no memory left


def _start() -> subprocess.Popen:
    command = [sys.executable, "-m", "es_trainer.rewards.grader", str(CPU_SECONDS)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
