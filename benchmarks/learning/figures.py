"""Pictures and tables of docs/results.md, from the files of the runs."""

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .results import best_choice, path_of, read
from .studies import STUDIES
from .tasks import TASKS


DOCS = Path(__file__).parents[2] / "docs"
EQUAL = 1024  # completions at which all are compared

Runs = list[dict[str, Any]]  # those of one arm


def draw() -> None:
    """Write the pictures, and the tables into their places in docs/results.md."""
    page = DOCS / "results.md"
    text = page.read_text()
    for study in STUDIES:
        arms = finished(study)
        if arms:
            picture(study, arms).savefig(DOCS / "results" / f"{study}.png", dpi=110)
            text = placed(text, study, table(study, arms))
    page.write_text(text)


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
        raise ValueError(f"docs/results.md has no place for {name!r}: add the lines {begin.strip()} and {end}.")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}{block}{end}", text, flags=re.DOTALL)


def table(study: str, arms: dict[str, Runs]) -> str:
    """A row for each arm: medians over the seeds, with the lowest and the highest where they differ."""
    seconds = min(final_seconds(runs) for runs in arms.values())
    reward = TASKS[STUDIES[study].task].metric
    columns: dict[str, Callable[[dict[str, Any]], float]] = {
        "before": lambda run: run["history"][0][reward],
        f"after {EQUAL} completions": lambda run: at(run, "completions", EQUAL)[reward],
        f"after {seconds:.0f} s": lambda run: at(run, "seconds", seconds)[reward],
        "at the end": lambda run: run["history"][-1][reward],
        "KL to the start": lambda run: run["history"][-1]["kl"],
        "empty, cut or repeated": lambda run: sum(
            value for name, value in run["history"][-1].items() if name.startswith("share/")
        ),
        "nats a token on other texts": lambda run: run["history"][-1]["texts_nll"],
    }
    lines = [
        "| run | seeds | completions | seconds | peak MiB | " + " | ".join(columns) + " |",
        "| --- " * (5 + len(columns)) + "|",
    ]
    for name, runs in arms.items():
        last = runs[0]["history"][-1]
        peak = statistics.median(run["history"][-1]["peak_mib"] for run in runs)
        cells = [name, len(runs), last["completions"], f"{final_seconds(runs):.0f}", f"{peak:.0f}"]
        cells += [spread([column(run) for run in runs]) for column in columns.values()]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def final_seconds(runs: Runs) -> float:
    return statistics.median(run["history"][-1]["seconds"] for run in runs)


def at(run: dict[str, Any], key: str, limit: float) -> dict[str, float]:
    """The last measurement that is not beyond a limit."""
    return [entry for entry in run["history"] if entry[key] <= limit][-1]


def spread(values: list[float]) -> str:
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
