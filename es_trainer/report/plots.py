"""Pictures of rewards over steps."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..run.history_file import HISTORY_NAME, History


if TYPE_CHECKING:
    from matplotlib.axes import Axes


STATE_NAME = "trainer_state.json"

FIGURES = {"reward/center": "center", "reward_std": "spread", "signal": "signal"}  # of a step, beside its reward
HELD_OUT = re.compile(r"eval_(?:(.+)_)?reward")


def plot_rewards(runs: dict[str, list[dict[str, Any]]], path: str | Path) -> None:
    """
    Draw the rewards of runs into one picture: the population's mean and range, and the reward of held-out prompts.

    Args:
        runs (`dict[str, list[dict[str, Any]]]`):
            Logs of each run, as in [`~transformers.TrainerState`]'s `log_history`, by the name of the run. Values
            that are `None` are left out.
        path (`str` or `Path`):
            Where to write the picture; the suffix says in which format.
    """
    with picture(path) as axes:
        for number, (name, logs) in enumerate(runs.items()):
            color = f"C{number % 10}"
            steps, low, high = _columns(logs, "reward_min", "reward_max")
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            steps, means = _columns(logs, "reward")
            if steps:
                axes.plot(steps, means, color=color, label=f"{name}: members (mean, range)")
            for marker, (key, of_set) in zip(cycle("os^Dv"), held_out_sets(logs).items()):
                steps, means = _columns(logs, key)
                label = f"{name}: held-out {of_set}".strip()
                axes.plot(steps, means, color=color, linestyle="--", marker=marker, markersize=4, label=label)
        axes.set(xlabel="step", ylabel="reward")
        axes.xaxis.get_major_locator().set_params(integer=True)


@contextlib.contextmanager
def picture(path: str | Path) -> "Iterator[Axes]":
    """A picture to draw into; see [`pictures`]."""
    with pictures(path, 1, figsize=(8, 4.5)) as (axes,):
        yield axes


@contextlib.contextmanager
def pictures(path: str | Path, number: int, figsize: tuple[float, float]) -> "Iterator[list[Axes]]":
    """Pictures side by side to draw into. Afterwards, they are written with grids and the labels that there are."""
    # Imported where it is used: importing matplotlib takes a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    every = [figure.add_subplot(1, number, i + 1) for i in range(number)]
    yield every
    for axes in every:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def read_run(folder: str | Path) -> list[dict[str, Any]]:
    """
    Read the logs of a run, finished or not.

    Args:
        folder (`str` or `Path`):
            The run's output folder, or one of its checkpoints.

    Returns:
        `list[dict[str, Any]]`:
            Logs, as in [`~transformers.TrainerState`]'s `log_history`. The population's are those of every step, from
            the run's history, where the folder has one.

    Raises:
        `FileNotFoundError`: If the folder has neither a `trainer_state.json` nor a `history.jsonl`.
    """
    folder = Path(folder)
    checkpoints = list(folder.glob("checkpoint-*"))
    states = [_read_state(f / STATE_NAME) for f in [folder, *checkpoints] if (f / STATE_NAME).is_file()]
    histories = [_read_history(f / HISTORY_NAME) for f in [folder, *checkpoints] if (f / HISTORY_NAME).is_file()]
    if not states and not histories:
        raise FileNotFoundError(
            f"{str(folder)!r} is not the folder of a run: neither it nor a checkpoint in it has a {STATE_NAME} or a "
            f"{HISTORY_NAME}. Give the output folder of a run that has done a step."
        )
    logs = max(states, key=lambda state: state["global_step"])["log_history"] if states else []
    # The folder's own file is that of the last run in it; checkpoints may be older
    steps = histories[0] if (folder / HISTORY_NAME).is_file() else max(histories, key=len, default=[])
    if not steps:
        return logs
    # Another call of train() counts its steps from 1 again, and its logs do so
    before = steps[-1]["step"] - steps[-1].pop("global_step")
    steps = [{key: value for key, value in step.items() if key != "global_step"} for step in steps]
    logs = [{**log, "step": log["step"] + before} for log in logs if "reward" not in log]
    return [*steps, *(log for log in logs if log["step"] <= steps[-1]["step"])]


def _read_state(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _read_history(path: Path) -> list[dict[str, Any]]:
    _, lines = History(path).read()
    return [
        {"step": line["step"], "global_step": line.get("global_step", line["step"]), **line["metrics"]}
        for line in lines
    ]


def _columns(logs: list[dict[str, Any]], *keys: str) -> tuple[list[Any], ...]:
    """The steps and these values of the logs that have all of them."""
    complete = [log for log in logs if all(log.get(key) is not None for key in keys)]
    rows = [[log["step"], *(log[key] for key in keys)] for log in complete]
    return tuple(map(list, zip(*rows, strict=True))) if rows else ([],) * (len(keys) + 1)


def held_out_labels(logs: dict[str, Any]) -> dict[str, str]:
    """What to call the rewards of held-out prompts in a log, by their keys."""
    return {key: f"held-out {name}".strip() for key, name in held_out_sets([logs]).items()}


def held_out_sets(logs: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Keys of the rewards of held-out prompts, and the name of each set; it is empty if there is one without."""
    found = {key: HELD_OUT.fullmatch(key) for log in logs for key, value in log.items() if value is not None}
    return {key: match[1] or "" for key, match in found.items() if match}
