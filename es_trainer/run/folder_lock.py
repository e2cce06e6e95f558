"""One run at a time writes into a folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


LOCK = "_run.lock"  # files with such a name are not pushed to the Hub


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """
    Inside, no other run gets into the folder. The system takes the lock back when the process ends, however it ends.

    Args:
        folder (`Path`):
            The output folder of a run.

    Raises:
        `RuntimeError`: If another run is in it.
        `OSError`: If it cannot be written to.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(
            f"`output_dir={str(folder)!r}`: another run is training in this folder, and both would write the same "
            "files. Choose another folder, or wait for its end."
        ) from error
    except OSError as error:
        error.add_note(f"`output_dir={str(folder)!r}` cannot be written to, so nothing was trained. Choose another.")
        raise
    try:
        yield
    finally:
        lock.release()
