"""
Does the logged signal say what it claims? `python benchmarks/reliability.py`, a minute or two on two cores.

The signal of one step's rewards (docs/monitoring.md) is the share of the variance of the members' fitness that would
come again with other prompts, so it should be the correlation of the members' fitness on two sets of prompts. One
population answers many prompts, which are split at random into two sets of each size. Printed are the signal of the
first set and the correlation with the second one: means over the splits, then medians over the seeds. The last columns
have the expected gain of the update with `learning_rate="sigma"` from all prompts, and what held-out prompts gain.
"""

import argparse
import logging
import statistics
import tempfile
from dataclasses import dataclass

import numpy as np
from subjects import Subject, subject

from es_trainer.evolution.signal import signal


SPLITS = 200


@dataclass(frozen=True)
class Step:
    """One step: rewards of shape `(members, prompts)`, and what its update is expected to gain and gains."""

    rewards: np.ndarray
    expected: float
    gain: float


def step(subject: Subject, sigma: float, seed: int, options: argparse.Namespace) -> Step:
    rewards = []

    def kept(*args, **kwargs) -> list[float]:
        rewards.append(subject.reward(*args, **kwargs))
        return rewards[-1]

    with tempfile.TemporaryDirectory() as folder:
        args = subject.config(
            seed,
            output_dir=folder,
            max_steps=1,
            population_size=options.population,
            population_batch_size=options.population,
            num_prompts_per_step=2 * max(options.prompts),
            sigma=sigma,
            learning_rate="sigma",
        )
        trainer = subject.trainer(args, reward=kept)
        before = trainer.evaluate()["eval_reward"]
        rewards.clear()  # those of the evaluation
        trainer.train()
        matrix = np.array(rewards)
        gain = trainer.evaluate()["eval_reward"] - before
    (log,) = (log for log in trainer.state.log_history if "loss" in log)
    return Step(matrix, log.get("expected_gain", 0.0), gain)


def predicted_and_found(rewards: np.ndarray, count: int, seed: int) -> tuple[float, float]:
    """Signal of `count` prompts, and correlation with as many others. NaN where no members differ."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(SPLITS):
        order = rng.permutation(rewards.shape[1])
        here, there = rewards[:, order[:count]], rewards[:, order[count : 2 * count]]
        if np.ptp(here.mean(axis=1)) and np.ptp(there.mean(axis=1)):
            correlation = np.corrcoef(here.mean(axis=1), there.mean(axis=1))[0, 1]
            pairs.append((signal(here).reliability, correlation))
    return tuple(np.mean(pairs, axis=0)) if pairs else (np.nan, np.nan)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["letters", "digits"], help="or smollm2")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.1, 1.0, 4.0], help="times a sigma that learns")
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--prompts", type=int, nargs="+", default=[4, 8, 16, 24])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    logging.getLogger("es_trainer").setLevel(logging.ERROR)
    sizes = [f"{count} prompts" for count in options.prompts]
    columns = ["task", "sigma", *sizes, "expected gain", "gain"]
    print("signal / correlation")
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    apart = []
    for name in options.tasks:
        chosen = subject(name)
        for factor in options.factors:
            sigma = factor * chosen.sigma
            steps = [step(chosen, sigma, seed, options) for seed in options.seeds]
            cells = []
            for count in options.prompts:
                pairs = [
                    predicted_and_found(one.rewards, count, seed)
                    for one, seed in zip(steps, options.seeds, strict=True)
                ]
                apart += [abs(predicted - found) for predicted, found in pairs]
                predicted, found = (statistics.median(values) for values in zip(*pairs, strict=True))
                cells.append(f"{predicted:.2f} / {found:.2f}")
            gains = [statistics.median(getattr(one, key) for one in steps) for key in ("expected", "gain")]
            cells += [f"{gain:.3g}" for gain in gains]
            print(f"| {name} | {sigma:g} | {' | '.join(cells)} |", flush=True)
    print(f"median difference of signal and correlation: {np.nanmedian(apart):.2f}, largest {np.nanmax(apart):.2f}")
