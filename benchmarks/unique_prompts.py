"""
Members that answer prompts of their own: `python benchmarks/unique_prompts.py`, some minutes.

Runs of as many completions: all members answer the same prompts, each pair its own, or each member its own; with some
numbers of prompts and learning rates. Pairs have longer updates: with 0.35 sigma, those with prompts of their own are
as long as those of members without pairs with 0.5 sigma. Printed are medians over the seeds: the reward of held-out
prompts at the end, `signal` over the steps, and the seconds of a step. The model is tiny.
"""

import argparse
import logging
from typing import Any

from subjects import print_medians, subject, trained


WAYS: dict[str, dict[str, Any]] = {
    "the same prompts": {},
    "the same prompts, in pairs": {"antithetic": True},
    "each pair its own": {"antithetic": True, "unique_prompts": True},
    "each member its own": {"unique_prompts": True},
}
KEYS = ("signal", "step_time")


def run(options: argparse.Namespace, seed: int, way: str, prompts: int, learning_rate: float) -> dict[str, float]:
    return trained(
        subject(options.task),
        KEYS,
        seed,
        max_steps=options.steps,
        population_size=options.population,
        num_prompts_per_step=prompts,
        learning_rate=f"{learning_rate}*sigma",
        **WAYS[way],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="letters", help="or digits")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[0.35, 0.5], help="times sigma")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    logging.getLogger("es_trainer").setLevel(logging.ERROR)
    for prompts in options.prompts:
        for way in WAYS:
            for learning_rate in options.learning_rates:
                runs = [run(options, seed, way, prompts, learning_rate) for seed in options.seeds]
                print_medians(f"{prompts} prompts, {way}, learning_rate={learning_rate}*sigma", runs)
