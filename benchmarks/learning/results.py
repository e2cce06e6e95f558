"""The files of the runs."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from .studies import STUDIES
from .tasks import TASKS


RESULTS = Path(__file__).with_name("results")


def path_of(study: str, arm: str, seed: int, choice: Any) -> Path:
    of_choice = "" if choice is None else f"-{choice:g}"
    return RESULTS / study / f"{arm.replace(' ', '-')}{of_choice}-seed{seed}.json"


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def metric_of(study: str) -> str:
    """What the runs of a study are compared by."""
    return TASKS[STUDIES[study].task].metric


def best_choice(study: str, name: str) -> Any:
    """
    The choice with the best final held-out reward of the first seed; `None` if there is none, or not yet.

    Among equals, it is the one that comes there soonest, by the mean of all measurements.
    """
    arm = STUDIES[study].arms[name]
    if arm.tuned_as:
        return best_choice(*arm.tuned_as)
    found = {choice: read(path_of(study, name, STUDIES[study].seeds[0], choice)) for choice in arm.choices}
    if not found or not all(run and run["done"] for run in found.values()):
        return None
    metric = metric_of(study)

    def reward(choice: Any) -> tuple[float, float]:
        along_the_way = [entry[metric] for entry in found[choice]["history"]]
        return along_the_way[-1], fmean(along_the_way)

    return max(found, key=reward)
