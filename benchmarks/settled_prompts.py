"""
Prompts that tell no members apart: `python benchmarks/settled_prompts.py`, some minutes.

Half of the training prompts give every member the same reward. Runs with and without `skip_settled_prompts` go on
until held-out prompts like the other half reach a reward. Printed is how many completions that took, for each seed,
and the median of the ratios. The model is tiny: it learns to write lower-case letters.
"""

import argparse
import logging
import statistics
import tempfile
from dataclasses import replace

from datasets import Dataset, concatenate_datasets
from subjects import Subject, letters, numbers, subject
from transformers import TrainerCallback


def letters_or_settled(completions, is_settled, **kwargs) -> list[float]:
    return [1.0 if one else reward for one, reward in zip(is_settled, letters(completions), strict=True)]


def rows(first: int, count: int, settled: bool) -> Dataset:
    return numbers(first, count).add_column("is_settled", [settled] * count)


class StopAt(TrainerCallback):
    """Ends the run when a held-out reward is reached."""

    def __init__(self, reward: float):
        self.reward = reward
        self.last = 0.0

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.last = metrics["eval_reward"]
        control.should_training_stop = self.last >= self.reward


def half_settled() -> Subject:
    # Few, so that training sees them many times: the first time, nothing is known of a prompt
    train = concatenate_datasets([rows(10, 16, settled=True), rows(26, 16, settled=False)])
    return replace(subject("letters"), train=train, held_out=rows(66, 32, settled=False), reward=letters_or_settled)


def completions_needed(options: argparse.Namespace, seed: int, skip: float) -> int:
    chosen = half_settled()
    with tempfile.TemporaryDirectory() as folder:
        args = chosen.config(
            seed,
            output_dir=folder,
            max_steps=options.steps,
            population_size=options.population,
            num_prompts_per_step=options.prompts,
            skip_settled_prompts=skip,
            sigma=chosen.sigma,
            learning_rate="sigma/2",
            eval_strategy="steps",
            eval_steps=1,
        )
        stop = StopAt(options.reward)
        trainer = chosen.trainer(args)
        trainer.add_callback(stop)
        trainer.train()
    if stop.last < options.reward:
        raise RuntimeError(
            f"Seed {seed}: the held-out reward is {stop.last:.3f} after {options.steps} steps. Allow more."
        )
    return trainer.state.global_step * options.population * options.prompts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="most steps of a run")
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--reward", type=float, default=0.95, help="held-out reward at which a run ends")
    parser.add_argument("--skip", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    logging.getLogger("es_trainer").setLevel(logging.ERROR)
    ratios = []
    for seed in options.seeds:
        plain, skipping = (completions_needed(options, seed, skip) for skip in (0.0, options.skip))
        ratios.append(plain / skipping)
        print(
            f"seed {seed}: {plain} completions, {skipping} with skip_settled_prompts: {ratios[-1]:.2f} times fewer",
            flush=True,
        )
    print(f"median: {statistics.median(ratios):.2f} times fewer")
