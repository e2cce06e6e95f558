"""The history of a run while it trains: begun, gone on with from a checkpoint or from itself, and repeated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .history import agree, differences, with_defaults
from .history_file import History
from .processes import Processes


logger = logging.get_logger(__name__)


class RunHistory(History):
    """
    The history in the output folder of a run, which process 0 writes.

    Args:
        path (`str` or `Path`):
            The JSON lines file.
        processes ([`Processes`]):
            Those of the run.
    """

    def __init__(self, path: str | Path, processes: Processes):
        super().__init__(path)
        self.processes = processes
        self.header: dict[str, Any] = {}  # of a run that begins
        self._to_repeat: list[dict[str, Any]] = []  # updates that were done before the run was interrupted

    def begin(self, header: dict[str, Any], go_on: bool) -> None:
        """
        Begin a run, or repeat the updates of one that was interrupted before its first checkpoint.

        Args:
            header (`dict[str, Any]`):
                What describes the run. It is written with the first update.
            go_on (`bool`):
                Whether to repeat the updates that the file has.
        """
        self.header = header
        self._to_repeat = []
        if go_on:
            self.resume(header, [], go_on)

    def resume(self, header: dict[str, Any], steps: list[dict[str, Any]], go_on: bool) -> None:
        """
        Go on from a checkpoint.

        Args:
            header (`dict[str, Any]`):
                What describes the run.
            steps (`list[dict[str, Any]]`):
                The updates up to the checkpoint.
            go_on (`bool`):
                Whether to repeat the later updates that the file has. If not, the file is kept under another name.
        """
        (self._to_repeat, *_) = self.processes.exchange(lambda: self._resume(header, steps, go_on))

    def _resume(self, header: dict[str, Any], steps: list[dict[str, Any]], go_on: bool) -> list[dict[str, Any]]:
        """Returns the updates to repeat."""
        if self.processes.rank > 0:
            return []
        later: list[dict[str, Any]] = []
        if self.path.is_file():
            try:
                there, lines = self.read()
            except ValueError as error:
                logger.warning(str(error))
                there, lines = {}, []
            if with_defaults(there) == with_defaults(header) and agree(steps, lines):
                later = lines[len(steps) :]
            if later and go_on:
                self.write(header, lines)  # without a torn last line
                logger.warning(
                    f"Going on after update {lines[-1]['step']} of {self.path}: the updates that are in no "
                    f"checkpoint, from {later[0]['step']} on, are done again from their seeds and utilities."
                )
                return later
            if later or there != header or not agree(steps, lines):
                self._keep()
        self.write(header, steps)
        return []

    def go_back(self, updates: int) -> None:
        """Let the file end after so many updates, where the weights are. A longer one is kept under another name."""
        self._to_repeat = []
        if self.processes.rank == 0:
            header, lines = self.read()
            if len(lines) > updates:
                self._keep()
                self.write(header, lines[:updates])

    def next_repeated(self, conditions: Callable[[], dict[str, Any]], updates: int) -> dict[str, Any] | None:
        """
        The next update if it was done before the run was interrupted.

        Args:
            conditions (`Callable`):
                Makes what its line has to say, or the settings are others now, and it is done anew.
            updates (`int`):
                Updates done so far.
        """
        if not self._to_repeat:
            return None
        line = self._to_repeat.pop(0)
        expected = {key: value for key, value in conditions().items() if key in line}
        if {key: line[key] for key in expected} == expected:
            return line
        logger.warning(
            f"The updates from {line['step']} on in {self.path} are of other settings than those given now: their "
            "members are evaluated anew."
        )
        self.go_back(updates)
        return None

    def append(self, step: dict[str, Any]) -> None:
        """Add the line of an update. The first of a run begins the file anew."""
        if self.processes.rank > 0:
            return
        if step["step"] == 1:
            self._keep()
            self.write(self.header, [])
        super().append(step)

    def _keep(self) -> None:
        """Give the file another name, so that what follows does not replace it."""
        kept = self.set_aside()
        if kept is not None:
            logger.warning(f"{self.path} was of an earlier run, or went on in another way: it is {kept} now.")

    def is_of_run(self, header: Callable[[], dict[str, Any]]) -> bool:
        """
        Whether there is a file, from which a run without a checkpoint can go on.

        Args:
            header (`Callable`):
                Makes what describes this run.

        Raises:
            `ValueError`: If it is the history of another run.
        """
        if not self.path.is_file():
            return False
        there, _ = self.read()
        mine = header()
        if with_defaults(there) != mine:
            found = differences(there, mine) or ["it started with other weights"]
            raise ValueError(
                f"`resume_from_checkpoint=True`: No valid checkpoint found in {self.path.parent}, and "
                f"{self.path.name} there is of another run: {'; '.join(found)}. Train with the same model and "
                "settings to go on with it, or without `resume_from_checkpoint` to start a new run."
            )
        return True
