"""The file of a run's history: JSON lines, of which the last may be torn."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)  # Transformers' own would import torch, which plots do without

HISTORY_NAME = "history.jsonl"


class History:
    """
    The file of a run: one line that describes the run, then one line for each update.

    Args:
        path (`str` or `Path`):
            The JSON lines file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def write(self, header: dict[str, Any], steps: list[dict[str, Any]]) -> None:
        """Write the file anew. What was there before is replaced at once, or not at all."""
        with self._telling():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".new")
            new.write_text("".join(json.dumps(line) + "\n" for line in [header, *steps]))
            os.replace(new, self.path)

    def append(self, step: dict[str, Any]) -> None:
        """Add the line of an update."""
        with self._telling(), self.path.open("a") as file:
            file.write(json.dumps(step) + "\n")

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Inside, errors of the disk say what they mean for the run."""
        try:
            yield
        except OSError as error:
            error.add_note(
                f"The history {self.path} could not be written. The updates that it had are still there: put right "
                "what is wrong with the disk, and start the run again with `resume_from_checkpoint=True`."
            )
            raise

    def set_aside(self) -> Path | None:
        """Give the file another name, with the first number that is free. Returns that, or `None` without a file."""
        if not self.path.is_file():
            return None
        number = 1
        while (aside := self.path.with_name(f"{self.path.stem}-{number}{self.path.suffix}")).exists():
            number += 1
        return self.path.rename(aside)

    def read(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """
        The line that describes the run, and those of the updates.

        A last line that is not complete, because the run was killed while it wrote, is left out with a warning.

        Raises:
            `ValueError`: If another line is no JSON; says which.
        """
        texts = self.path.read_bytes().rstrip(b"\n").split(b"\n")
        lines = []
        for number, text in enumerate(texts, 1):
            try:
                lines.append(json.loads(text))
            except ValueError as error:
                if 1 < number == len(texts):
                    logger.warning(f"Line {number} of {self.path} is not complete (the run was killed?): left out.")
                    break
                raise ValueError(
                    f"Line {number} of {self.path} is not JSON ({error}), so it is not the history of a run, or was "
                    "damaged. Take the one of a checkpoint."
                ) from error
        header, *steps = lines
        return header, steps
