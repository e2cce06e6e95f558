"""
Does it learn, and against GRPO? `python -m benchmarks.learning STUDY ...` from the root of the repository.

Trains SmolLM2-135M-Instruct by ESTrainer and by TRL's GRPOTrainer with the same rewards, prompts and held-out prompts,
and writes a file for each run into `benchmarks/learning/results`. Runs that are done are not run again. What was
interrupted goes on with the run it was at, from the last measurement. `--draw` makes the pictures and tables of
docs/results.md.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from .results import best_choice, path_of, read
from .studies import STUDIES


def runs(study_name: str) -> list[tuple[str, int, Any]]:
    """Runs that are known by now: the arm, the seed, and the choice. Others follow from what these find."""
    study = STUDIES[study_name]
    known = []
    for name, arm in study.arms.items():
        first, *others = study.seeds
        if arm.choices:
            known += [(name, first, choice) for choice in arm.choices]
        best = best_choice(study_name, name)
        if arm.tuned and best is None:
            continue
        seeds = others if arm.choices else study.seeds
        known += [(name, seed, best) for seed in seeds]
    return known


def pending(studies: list[str], arms: list[str] | None) -> tuple[str, str, int, Any] | None:
    """The next run that is not done."""
    for study in studies:
        for name, seed, choice in runs(study):
            run = read(path_of(study, name, seed, choice))
            if (arms is None or name in arms) and not (run and run["done"]):
                return study, name, seed, choice
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", default=list(STUDIES), help=", ".join(STUDIES))
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--draw", action="store_true", help="make pictures and tables of what there is")
    parser.add_argument("--run", help="one run in this process, as JSON: study, arm, seed, choice")
    options = parser.parse_args()
    if options.run:
        from .one_run import run

        name, arm, seed, choice = json.loads(options.run)
        run(name, arm, seed, choice)
    elif options.draw:
        from .figures import draw

        draw()
    else:
        while (following := pending(options.studies, options.arms)) is not None:
            begin = time.time()
            command = [sys.executable, "-m", "benchmarks.learning", "--run", json.dumps(following)]
            subprocess.run(command, check=True)
            print(*following, f"{time.time() - begin:.0f} s", read(path_of(*following))["history"][-1], flush=True)
