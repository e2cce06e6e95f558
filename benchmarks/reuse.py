"""
Populations that are used for several steps: `python benchmarks/reuse.py`, some minutes.

Runs with `num_steps_per_population` of 1, 2 and 4 do the same number of steps, each with some learning rates. Printed
are medians over the seeds: the reward of held-out prompts at the end, `signal` and `update_cosine` over the steps, and
the seconds of a step in which noise is made. The model is tiny.
"""

import argparse
import logging

from subjects import print_medians, subject, trained


KEYS = ("signal", "update_cosine", "noise_seconds")


def run(options: argparse.Namespace, seed: int, reuse: int, learning_rate: float) -> dict[str, float]:
    return trained(
        subject(options.task),
        KEYS,
        seed,
        max_steps=options.steps,
        num_steps_per_population=reuse,
        population_size=options.population,
        num_prompts_per_step=options.prompts,
        learning_rate=f"{learning_rate}*sigma",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="letters", help="or digits")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--reuse", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="times sigma")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    logging.getLogger("es_trainer").setLevel(logging.ERROR)
    for reuse in options.reuse:
        for learning_rate in options.learning_rates:
            runs = [run(options, seed, reuse, learning_rate) for seed in options.seeds]
            print_medians(f"num_steps_per_population={reuse} learning_rate={learning_rate}*sigma", runs)
