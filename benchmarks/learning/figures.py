"""Pictures and tables of docs/results.md and README.md, from the files of the runs."""

import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .results import best_choice, path_of, read
from .studies import STUDIES
from .tasks import TASKS


DOCS = Path(__file__).parents[2] / "docs"
EQUAL = 1024  # completions at which all are compared
ON_THE_FRONT_PAGE = "kinds"

# What a table has of the end of runs, beside the metric
MEASURES = {
    "pass@1": "pass@1",
    "pass@8": "pass@8",
    "kl": "KL to the start",
    "share/cut": "cut",
    "share/empty": "empty",
    "share/repeated": "repeated",
    "texts_nll": "nats a token on other texts",
}

Runs = list[dict[str, Any]]  # those of one arm
Column = Callable[[Runs], str]


def draw() -> None:
    """Write the pictures, and the tables into their places on the pages."""
    for study in STUDIES:
        arms = finished(study)
        if arms:
            picture(study, arms).savefig(DOCS / "results" / f"{study}.png", dpi=110)
    for page, text in pages().items():
        page.write_text(text)


def pages() -> dict[Path, str]:
    """The pages as they have to be."""
    results, readme = DOCS / "results.md", DOCS.parent / "README.md"
    texts = {page: page.read_text() for page in (results, readme)}
    for study in STUDIES:
        arms = finished(study)
        if arms:
            texts[results] = placed(texts[results], study, f"{learned(study, arms)}\n{became(arms)}")
        if study == ON_THE_FRONT_PAGE:
            texts[readme] = placed(texts[readme], study, learned(study, arms))
    return texts


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


def placed(text: str, name: str, block: str) -> str:
    """The page with a table between its two marks."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if begin not in text:
        raise ValueError(f"The page has no place for {name!r}: add the lines {begin.strip()} and {end}.")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}{block}{end}", text, flags=re.DOTALL)


def learned(study: str, arms: dict[str, Runs]) -> str:
    """A table of the metric, at equal completions and at equal seconds, and of what it cost."""
    metric = TASKS[STUDIES[study].task].metric
    seconds = min(final_seconds(runs) for runs in arms.values())
    columns: dict[str, Column] = {
        "seeds": lambda runs: str(len(runs)),
        "completions": lambda runs: f"{runs[0]['history'][-1]['completions']}",
        "seconds": lambda runs: f"{final_seconds(runs):.0f}",
        "peak MiB": lambda runs: f"{statistics.median(run['history'][-1]['peak_mib'] for run in runs):.0f}",
        f"{metric} before": lambda runs: spread(run["history"][0][metric] for run in runs),
        f"after {EQUAL} completions": lambda runs: spread(at(run, "completions", EQUAL, metric) for run in runs),
        f"after {seconds:.0f} s": lambda runs: spread(at(run, "seconds", seconds, metric) for run in runs),
        "at the end": lambda runs: spread(run["history"][-1][metric] for run in runs),
    }
    return rows(arms, columns)


def became(arms: dict[str, Runs]) -> str:
    """A table of what became of the model."""
    first = [run["history"][0] for runs in arms.values() for run in runs]
    columns: dict[str, Column] = {
        f"{label} (before: {statistics.median(entry[key] for entry in first):.2g})": lambda runs, key=key: spread(
            run["history"][-1][key] for run in runs
        )
        for key, label in MEASURES.items()
        if key in first[0]
    }
    return rows(arms, columns)


def rows(arms: dict[str, Runs], columns: dict[str, Column]) -> str:
    """A row for each arm: medians over the seeds, with the lowest and the highest where they differ."""
    lines = ["| run | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
    for name, runs in arms.items():
        lines.append(f"| {name} | " + " | ".join(column(runs) for column in columns.values()) + " |")
    return "\n".join(lines) + "\n"


def final_seconds(runs: Runs) -> float:
    return statistics.median(run["history"][-1]["seconds"] for run in runs)


def at(run: dict[str, Any], key: str, limit: float, metric: str) -> float:
    """The metric at a limit, on the line between the measurements before and after it."""
    history = run["history"]
    return float(np.interp(limit, [entry[key] for entry in history], [entry[metric] for entry in history]))


def spread(values: Iterable[float]) -> str:
    values = list(values)
    median, low, high = (f"{value:.3g}" for value in (statistics.median(values), min(values), max(values)))
    return median if low == high else f"{median} ({low} to {high})"


def picture(study: str, arms: dict[str, Runs]) -> Figure:
    """The reward by completions, by seconds and by the distance from the start."""
    metric = TASKS[STUDIES[study].task].metric
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "completions": "completions",
        "seconds": "seconds of training",
        "kl": "KL to the start, nats a token",
    }
    for axes, (key, label) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for name, runs in arms.items():
            line(axes, key, metric, name, runs)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"held-out {metric}")
    figure.axes[0].legend()
    return figure


def line(axes: Axes, key: str, reward: str, name: str, runs: Runs) -> None:
    """The median over the seeds, in a band from the lowest to the highest."""
    entries = list(zip(*(run["history"] for run in runs), strict=True))
    x = [statistics.median(entry[key] for entry in same) for same in entries]
    y = [[entry[reward] for entry in same] for same in entries]
    (drawn,) = axes.plot(x, list(map(statistics.median, y)), marker=".", label=name)
    if key != "kl":  # in which a run can go back and forth
        axes.fill_between(x, list(map(min, y)), list(map(max, y)), color=drawn.get_color(), alpha=0.15)
