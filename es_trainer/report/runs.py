"""Runs as they are compared: what was set, and what was logged."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..run.history_file import HISTORY_NAME, History
from ..schedules import as_schedule, total_of
from .plots import held_out_sets, read_run


SEEDS = ("seed", "data_seed")  # settings by which runs that are alike may differ
AXES = ("steps", "tokens", "hours", "completions")


@dataclass(frozen=True)
class Run:
    """
    A run, finished or not.

    Args:
        name (`str`):
            How it is called.
        settings (`dict[str, Any]`):
            Settings that make the run what it is, from its history; empty without one.
        logs (`list[dict[str, Any]]`):
            What [`read_run`] returned.
    """

    name: str
    settings: dict[str, Any]
    logs: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: str | Path, name: str | None = None) -> "Run":
        """
        Read a run.

        Args:
            folder (`str` or `Path`):
                Its output folder.
            name (`str`, *optional*):
                If `None`, that of the folder.

        Raises:
            `FileNotFoundError`: If the folder is not that of a run.
        """
        folder = Path(folder)
        logs = read_run(folder)
        path = folder / HISTORY_NAME
        settings = History(path).read()[0]["config"] if path.is_file() else {}
        return cls(name or folder.resolve().name, settings, logs)

    @property
    def without_seeds(self) -> dict[str, Any]:
        """The settings without those by which runs that are alike may differ."""
        return {key: value for key, value in self.settings.items() if key not in SEEDS}

    def column(self, metric: str) -> list[tuple[int, float]]:
        """Steps and values of a metric, where it was logged."""
        return [(log["step"], log[metric]) for log in self.logs if log.get(metric) is not None]

    def held_out(self) -> dict[str, list[tuple[int, float]]]:
        """Rewards of each set of held-out prompts, by its name."""
        return {name or "held-out": self.column(key) for key, name in held_out_sets(self.logs).items()}

    def spent(self, axis: str) -> Callable[[int], float]:
        """
        How much of something the run had used after a step.

        Args:
            axis (`str`):
                `"steps"`, `"tokens"` (of prompts and completions), `"hours"` (of steps, without evaluations) or
                `"completions"`.

        Raises:
            `ValueError`: If the run's logs do not say.
        """
        if axis == "steps":
            return float
        if axis == "completions":
            names = ("population_size", "num_prompts_per_step", "num_generations")
            if not all(name in self.settings for name in names):
                raise ValueError(
                    f"The run {self.name!r} has no {HISTORY_NAME}: how many completions it made is unknown."
                )
            # JSON has text for the steps of a schedule
            schedules = [as_schedule(name, self.settings.get(f"{name}_schedule")) for name in names]
            settings = list(zip((self.settings[name] for name in names), schedules, strict=True))
            return lambda step: float(total_of(step, *settings))
        found, total = {0: 0.0}, 0.0
        key = "num_tokens" if axis == "tokens" else "step_time"
        for step, value in self.column(key):
            total = float(value) if axis == "tokens" else total + value / 3600
            found[step] = total
        if len(found) == 1 and self.logs:
            raise ValueError(f"The logs of the run {self.name!r} have no {key!r}.")
        return lambda step: found[max(known for known in found if known <= step)]


def differing(runs: list[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs; `None` where a run does not have one."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}
