"""A picture of one metric of several runs."""

from pathlib import Path

import numpy as np

from .plots import picture
from .runs import Run


def plot_metric(runs: list[Run], path: str | Path, metric: str, axis: str = "steps", smooth: int = 1) -> None:
    """
    Draw a metric. Runs whose settings differ by seeds only are one line, their mean, in a band from the lowest to the
    highest.

    Args:
        runs (`list[Run]`):
            The runs.
        path (`str` or `Path`):
            Where to write the picture; the suffix says in which format.
        metric (`str`):
            A metric that was logged, such as `"reward"`, `"eval_reward"` or `"signal"`.
        axis (`str`, *optional*, defaults to `"steps"`):
            Over what; see [`Run.spent`].
        smooth (`int`, *optional*, defaults to `1`):
            Values that are averaged: each one with those before it.

    Raises:
        `ValueError`: If no run has logged the metric; says which there are.
    """
    if not any(run.column(metric) for run in runs):
        known = sorted({key for run in runs for log in run.logs for key in log if isinstance(log[key], float)})
        raise ValueError(f"`metric={metric!r}` is not valid: no run has logged it. There are: {', '.join(known)}.")
    with picture(path) as axes:
        for alike in _groups(runs):
            steps, values = _aligned(alike, metric)
            values = np.array([_smoothed(of_run, smooth) for of_run in values])
            spent = [run.spent(axis) for run in alike]
            x = [np.mean([of_run(step) for of_run in spent]) for step in steps]
            several = f" ({len(alike)} seeds)" if len(alike) > 1 else ""
            (line,) = axes.plot(x, values.mean(axis=0), marker="o", markersize=3, label=alike[0].name + several)
            if several:
                low, high = values.min(axis=0), values.max(axis=0)
                axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xlabel="step" if axis == "steps" else axis, ylabel=metric)


def _groups(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ by seeds only, together. What is not known of a run makes it one of its own."""
    groups: list[list[Run]] = []
    for run in runs:
        alike = next((g for g in groups if run.settings and g[0].without_seeds == run.without_seeds), None)
        if alike is None:
            groups.append([run])
        else:
            alike.append(run)
    return groups


def _aligned(runs: list[Run], metric: str) -> tuple[list[int], list[list[float]]]:
    """The steps in which all of the runs have the metric, and its values of each run."""
    columns = [dict(run.column(metric)) for run in runs]
    steps = sorted(set(columns[0]).intersection(*columns[1:]))
    return steps, [[column[step] for step in steps] for column in columns]


def _smoothed(values: list[float], count: int) -> list[float]:
    return [float(np.mean(values[max(0, i + 1 - count) : i + 1])) for i in range(len(values))]
