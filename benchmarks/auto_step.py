"""
Learning rates that are 8 times too large or too small, with and without `auto_step`: `python benchmarks/auto_step.py`,
some minutes.

A tiny model learns with `learning_rate` = 1/8, 1 and 8 times a good one. Printed is the held-out reward before and
after each run, as the median over the seeds.
"""

import argparse
import logging
import statistics
import tempfile

from subjects import subject


def held_out(task: str, seed: int, options: argparse.Namespace, ratio: float, auto_step: int) -> tuple[float, ...]:
    """Held-out reward before and after a run, and the last `step_scale`."""
    chosen = subject(task)
    with tempfile.TemporaryDirectory() as folder:
        args = chosen.config(
            seed,
            output_dir=folder,
            max_steps=options.steps,
            population_size=options.population,
            num_prompts_per_step=options.prompts,
            sigma=chosen.sigma,
            learning_rate=ratio * options.learning_rate * chosen.sigma,
            auto_step=auto_step,
        )
        trainer = chosen.trainer(args)
        before = trainer.evaluate()["eval_reward"]
        trainer.train()
        after = trainer.evaluate()["eval_reward"]
    return before, after, trainer.optimizer.step_scale


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["letters"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=4.0, help="a good one, in units of sigma")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1 / 8, 1.0, 8.0])
    parser.add_argument("--auto_step", type=int, nargs="+", default=[0, 1, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    logging.getLogger("es_trainer").setLevel(logging.ERROR)
    for task in options.tasks:
        for ratio in options.ratios:
            for auto_step in options.auto_step:
                found = [held_out(task, seed, options, ratio, auto_step) for seed in options.seeds]
                before, after, scale = (statistics.median(values) for values in zip(*found, strict=True))
                print(
                    f"{task}, {ratio:g} times the learning rate, auto_step={auto_step}: held-out reward "
                    f"{before:.3f} -> {after:.3f}, last step_scale {scale:g}",
                    flush=True,
                )
