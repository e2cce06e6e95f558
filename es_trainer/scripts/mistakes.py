"""A user's mistake is one line on stderr and exit status 2."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches


DEBUG = "ES_TRAINER_DEBUG"  # environment variable: processes that are started see it, too

# What the checks of options, data and models raise
MISTAKES = (ValueError, TypeError, OSError, ImportError)


@contextlib.contextmanager
def error_in_one_line(prog: str) -> Iterator[None]:
    """
    Inside, errors about what was given end the program with one line. With the environment variable
    `ES_TRAINER_DEBUG`, which `--debug` sets, they keep their traceback.

    Args:
        prog (`str`):
            Name of the program, with which the line begins.

    Raises:
        `SystemExit`: With status 2, after the line is printed.
    """
    try:
        yield
    except MISTAKES as error:
        if os.environ.get(DEBUG):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{prog}: error: {message} (--debug shows where.)", file=sys.stderr)
        raise SystemExit(2) from error


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error about an unknown name."""
    nearest = get_close_matches(name.replace("-", "_"), sorted(known), n=1)
    return f": did you mean {prefix + nearest[0]!r}?" if nearest else "."
