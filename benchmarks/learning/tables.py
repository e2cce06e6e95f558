"""Tables of the runs, in Markdown."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .results import best_choice, path_of, read
from .studies import STUDIES


Runs = list[dict[str, Any]]  # those of one arm
Column = Callable[[Runs], str]


def finished(study: str) -> dict[str, Runs]:
    """Runs that are done, by arm: those of the choice where there is one."""
    found = {}
    for name, arm in STUDIES[study].arms.items():
        choice = best_choice(study, name)
        if choice is None and arm.tuned:
            continue
        runs = [read(path_of(study, name, seed, choice)) for seed in STUDIES[study].seeds]
        if any(run and run["done"] for run in runs):
            found[name] = [run for run in runs if run and run["done"]]
    return found


def rows(arms: dict[str, Runs], columns: dict[str, Column]) -> str:
    """A row for each arm."""
    lines = ["| run | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
    for name, runs in arms.items():
        lines.append(f"| {name} | " + " | ".join(column(runs) for column in columns.values()) + " |")
    return "\n".join(lines) + "\n"


def seeds(runs: Runs) -> str:
    return str(len(runs))


def completions(runs: Runs) -> str:
    return str(runs[0]["history"][-1]["completions"])


def seconds(runs: Runs) -> str:
    return f"{final_seconds(runs):.0f}"


def peak(runs: Runs) -> str:
    return f"{statistics.median(ends(runs, 'peak_mib')):.0f}"


def first(key: str) -> Column:
    """A figure of the model that runs begin with."""
    return lambda runs: spread(begins(runs, key))


def final(key: str) -> Column:
    """A figure of the model that runs end with."""
    return lambda runs: spread(ends(runs, key))


def after(key: str, limit: float, metric: str) -> Column:
    """A figure where `key` has come to a limit, on the line between the measurements before and after it."""

    def of(run: dict[str, Any]) -> float:
        history = run["history"]
        return float(np.interp(limit, [entry[key] for entry in history], [entry[metric] for entry in history]))

    return lambda runs: spread(map(of, runs))


def begins(runs: Runs, key: str) -> list[float]:
    return [run["history"][0][key] for run in runs]


def ends(runs: Runs, key: str) -> list[float]:
    return [run["history"][-1][key] for run in runs]


def final_seconds(runs: Runs) -> float:
    return statistics.median(ends(runs, "seconds"))


def spread(values: Iterable[float]) -> str:
    """The median over the seeds, with the lowest and the highest where they differ."""
    values = list(values)
    median, low, high = (f"{value:.3g}" for value in (statistics.median(values), min(values), max(values)))
    return median if low == high else f"{median} ({low} to {high})"
