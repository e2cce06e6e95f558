"""The sections of docs/results.md: what the tables and the picture of each are made of."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .results import metric_of
from .studies import STUDIES, completions_of_a_step
from .tables import (
    Column,
    Runs,
    after,
    begins,
    completions,
    ends,
    final,
    final_seconds,
    finished,
    first,
    peak,
    rows,
    seconds,
    seeds,
    spread,
)
from .tasks import TASKS, other_than


# What a table has of the end of runs, beside the metric
MEASURES = {
    "macro_f1": "macro-F1",
    "pass@1": "pass@1",
    "pass@8": "pass@8",
    "kl": "KL to the start",
    "share/cut": "cut",
    "share/empty": "empty",
    "share/repeated": "repeated",
    "texts_nll": "nats a token on other texts",
}
HORIZONS = {study: TASKS[study].rooms for study in STUDIES if study.startswith("maze-")}
FORGETTING = ("conciseness", "kinds")
# The same in all pictures
COLORS = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(name for s in STUDIES.values() for name in s.arms))}


@dataclass(frozen=True)
class Section:
    """
    Args:
        runs (`Callable`):
            Returns the runs that are done. There is nothing to draw without any.
        table (`Callable`):
            Returns the tables of the runs.
        draw (`Callable`):
            Draws the runs into a figure.
        size (`tuple[float, float]`, *optional*):
            Width and height of the picture, in inches.
    """

    runs: Callable[[], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    draw: Callable[[Figure, dict[str, Any]], None]
    size: tuple[float, float] = (13, 3.8)

    def picture(self, runs: dict[str, Any], path: Path) -> None:
        figure = Figure(figsize=self.size, layout="constrained")
        FigureCanvasAgg(figure)
        self.draw(figure, runs)
        figure.savefig(path, dpi=110)


def of_study(study: str) -> Section:
    """The metric by completions, by seconds and by the distance from the start, and what became of the model."""
    return Section(
        runs=lambda: finished(study),
        table=lambda arms: f"{learned(study, arms)}\n{became(arms)}",
        draw=lambda figure, arms: draw_study(figure, study, arms),
    )


def learned(study: str, arms: dict[str, Runs]) -> str:
    """A table of the metric, at equal completions and at equal seconds, and of what it cost."""
    metric, equal = metric_of(study), min(STUDIES[study].budgets.values())
    shortest = min(final_seconds(runs) for runs in arms.values())
    columns: dict[str, Column] = {
        "seeds": seeds,
        "completions": completions,
        "seconds": seconds,
        "peak MiB": peak,
        f"{metric} before": first(metric),
        f"after {equal} completions": after("completions", equal, metric),
        f"after {shortest:.0f} s": after("seconds", shortest, metric),
        "at the end": final(metric),
    }
    return rows(arms, columns)


def became(arms: dict[str, Runs]) -> str:
    """A table of what became of the model."""
    starts = [run["history"][0] for runs in arms.values() for run in runs]
    columns = {
        f"{label} (before: {statistics.median(start[key] for start in starts):.2g})": final(key)
        for key, label in MEASURES.items()
        if key in starts[0]
    }
    return rows(arms, columns)


def draw_study(figure: Figure, study: str, arms: dict[str, Runs]) -> None:
    panels = {
        "completions": "completions",
        "seconds": "seconds of training",
        "kl": "KL to the start, nats a token",
    }
    draw_panels(figure, [(arms, key, metric_of(study), label) for key, label in panels.items()])
    figure.axes[0].set_ylabel(f"held-out {metric_of(study)}")


def draw_messages(figure: Figure, arms: dict[str, Runs]) -> None:
    """Both metrics by completions, and the one that is no mean by seconds."""
    panels = [("completions", "accuracy"), ("completions", "macro_f1"), ("seconds", "macro_f1")]
    draw_panels(figure, [(arms, key, metric, key) for key, metric in panels])
    for axes, (_, metric) in zip(figure.axes, panels, strict=True):
        axes.set_ylabel(f"held-out {metric}")


def horizons() -> dict[str, dict[str, Runs]]:
    """Runs by trainer and study, of the horizons that have any."""
    found = {study: finished(study) for study in HORIZONS}
    return {
        trainer: {study: arms[trainer] for study, arms in found.items() if trainer in arms}
        for trainer in ("es", "grpo")
        if any(trainer in arms for arms in found.values())
    }


def table_of_horizons(by_trainer: dict[str, dict[str, Runs]]) -> str:
    """Success before and after, by horizon, and what a run cost."""
    arms = {
        f"{trainer}, rooms: {HORIZONS[study]}": runs
        for trainer, by_study in by_trainer.items()
        for study, runs in by_study.items()
    }
    columns: dict[str, Column] = {
        "seeds": seeds,
        "games": completions,
        "seconds": seconds,
        "peak MiB": peak,
        "won before": first("won"),
        "won": final("won"),
        "rooms passed before": first("rooms"),
        "rooms passed": final("rooms"),
        "nats a token on other texts": final("texts_nll"),
    }
    return rows(arms, columns)


def draw_horizons(figure: Figure, by_trainer: dict[str, dict[str, Runs]]) -> None:
    """The end of the runs, and the start, which differs between trainers by the dtype it is measured in."""
    axes = figure.subplots()
    for trainer, by_study in by_trainer.items():
        rooms = [HORIZONS[study] for study in by_study]
        draw_band(axes, rooms, [ends(runs, "won") for runs in by_study.values()], trainer)
        before = [statistics.median(begins(runs, "won")) for runs in by_study.values()]
        axes.plot(rooms, before, "--", color=COLORS[trainer], label=f"{trainer}, before")
    axes.set(xlabel="rooms of a maze", ylabel="held-out games that are won", xticks=list(HORIZONS.values()))
    axes.grid(alpha=0.3)
    axes.legend()


def table_of_seeds(arms: dict[str, Runs]) -> str:
    """How far runs of the same settings come apart, and what they cost."""
    metric = metric_of("spread")
    columns: dict[str, Column] = {
        "seeds": seeds,
        "completions": completions,
        "seconds": seconds,
        "peak MiB": peak,
        "before": first(metric),
        "at the end": final(metric),
        "mean": lambda runs: f"{statistics.fmean(ends(runs, metric)):.3f}",
        "standard deviation": lambda runs: f"{statistics.stdev(ends(runs, metric)):.3f}" if len(runs) > 1 else "",
        "KL to the start": final("kl"),
        "nats a token on other texts": final("texts_nll"),
    }
    return rows(arms, columns)


def draw_seeds(figure: Figure, arms: dict[str, Runs]) -> None:
    """A point for each seed."""
    axes, metric = figure.subplots(), metric_of("spread")
    for place, runs in enumerate(arms.values()):
        axes.plot([place] * len(runs), ends(runs, metric), "o", alpha=0.6)
    axes.set_xticks(range(len(arms)), list(arms))
    axes.set_ylabel(f"final held-out {metric}")
    axes.grid(alpha=0.3)


def table_of_variants(arms: dict[str, Runs]) -> str:
    metric = metric_of("variants")
    columns: dict[str, Column] = {
        "seeds": seeds,
        "learning rate": lambda runs: f"{runs[0]['settings']['learning_rate']:g}",
        "steps": lambda runs: f"{runs[0]['history'][-1]['completions'] // completions_of_a_step(runs[0]['settings'])}",
        "seconds": seconds,
        "gain": lambda runs: spread(gains(runs, metric)),
        "KL to the start": final("kl"),
        "nats a token on other texts": final("texts_nll"),
    }
    return rows(arms, columns)


def gains(runs: Runs, metric: str) -> list[float]:
    return [end - begin for begin, end in zip(begins(runs, metric), ends(runs, metric), strict=True)]


def draw_variants(figure: Figure, arms: dict[str, Runs]) -> None:
    """The gain of each variant against what it forgets, from the lowest to the highest of the seeds."""
    axes, metric = figure.subplots(), metric_of("variants")
    for place, (name, runs) in enumerate(arms.items()):
        x, y = statistics.median(ends(runs, "texts_nll")), gains(runs, metric)
        middle = statistics.median(y)
        marker = "os"[place // 10]  # there are ten colors
        axes.errorbar(x, middle, [[middle - min(y)], [max(y) - middle]], fmt=marker, capsize=4, label=name)
    axes.set(xlabel="nats a token on other texts, at the end", ylabel=f"gain of held-out {metric}")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def table_of_forgetting(by_study: dict[str, dict[str, Runs]]) -> str:
    """The task, another one, and other texts, before and after."""
    arms = {f"{study}, {name}": runs for study, arms in by_study.items() for name, runs in arms.items()}
    equal = min(STUDIES[study].budgets["grpo"] for study in FORGETTING)
    columns: dict[str, Column] = {
        "learned before": lambda runs: first(learned_by(runs))(runs),
        "learned": lambda runs: final(learned_by(runs))(runs),
        "other task before": lambda runs: first(other_than_learned(runs))(runs),
        f"after {equal} completions": lambda runs: after("completions", equal, other_than_learned(runs))(runs),
        "at the end": lambda runs: final(other_than_learned(runs))(runs),
        "nats a token on other texts before": first("texts_nll"),
        f"nats after {equal} completions": after("completions", equal, "texts_nll"),
        "nats at the end": final("texts_nll"),
    }
    return rows(arms, columns)


def learned_by(runs: Runs) -> str:
    return TASKS[runs[0]["task"]].metric


def other_than_learned(runs: Runs) -> str:
    return f"other/{other_than(runs[0]['task']).metric}"


def forgetting() -> dict[str, dict[str, Runs]]:
    found = {study: finished(study) for study in FORGETTING}
    return {study: arms for study, arms in found.items() if arms}


def draw_forgetting(figure: Figure, by_study: dict[str, dict[str, Runs]]) -> None:
    draw_panels(
        figure,
        [(arms, "completions", "texts_nll", f"completions of learning {study}") for study, arms in by_study.items()],
    )
    figure.axes[0].set_ylabel("nats a token on other texts")


def draw_panels(figure: Figure, panels: list[tuple[dict[str, Runs], str, str, str]]) -> None:
    """Panels side by side, each of some arms: one figure of the measurements by another one, with its label."""
    for axes, (arms, key, metric, label) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for name, runs in arms.items():
            draw_runs(axes, key, metric, name, runs)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    max(figure.axes, key=lambda axes: len(axes.lines)).legend()


def draw_runs(axes: Axes, key: str, metric: str, name: str, runs: Runs) -> None:
    entries = list(zip(*(run["history"] for run in runs), strict=True))
    x = [statistics.median(entry[key] for entry in same) for same in entries]
    y = [[entry[metric] for entry in same] for same in entries]
    draw_band(axes, x, y, name, band=key != "kl")  # a run can go back and forth in its distance


def draw_band(axes: Axes, x: list[float], y: list[list[float]], name: str, band: bool = True) -> None:
    """The median over the seeds, in a band from the lowest to the highest."""
    axes.plot(x, list(map(statistics.median, y)), marker=".", label=name, color=COLORS[name])
    if band:
        axes.fill_between(x, list(map(min, y)), list(map(max, y)), color=COLORS[name], alpha=0.15)


SECTIONS = {
    "conciseness": of_study("conciseness"),
    "kinds": of_study("kinds"),
    "mazes": Section(horizons, table_of_horizons, draw_horizons, (6.5, 3.8)),
    "messages": replace(of_study("messages"), draw=draw_messages),
    "spread": Section(lambda: finished("spread"), table_of_seeds, draw_seeds, (6.5, 3.8)),
    "forgetting": Section(forgetting, table_of_forgetting, draw_forgetting),
    "variants": Section(lambda: finished("variants"), table_of_variants, draw_variants, (8, 4)),
}
