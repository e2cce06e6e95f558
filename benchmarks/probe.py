"""
What `es-trainer probe` recommends against a grid: `python benchmarks/probe.py`, a quarter of an hour on two cores.

For each task and seed, runs with 5 sigmas and 5 learning rates for each of them; the best of their held-out gains is
what a search finds. Probes then begin with both settings 8 times too small and 8 times too large (a probe tries
learning rates in units of sigma, so its own does not matter). One whose best sigma is the end of what it tried is
followed by another one from there. Printed are the held-out gain of a run with what was recommended (sigma, learning
rate), as a share of the grid's best, and the completions of the probes as a share of those of that run.
"""

import argparse
import logging
import statistics
import tempfile
from typing import NamedTuple

from subjects import Subject, subject

from es_trainer.probe import Probe
from es_trainer.run.probed import Found


FACTORS = [3.0**k for k in range(-2, 3)]
WRONG = [1 / 8, 8.0]
MOST_PROBES = 3


class Probed(NamedTuple):
    """What the last probe found, and the completions of all of them."""

    found: Found
    completions: int


def gain(subject: Subject, sigma: float, learning_rate: float, seed: int, options: argparse.Namespace) -> float:
    """Held-out reward of a run, after minus before."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {"max_steps": options.steps, **size(options)}
        args = subject.config(seed, output_dir=folder, sigma=sigma, learning_rate=learning_rate, **steps)
        trainer = subject.trainer(args)
        before = trainer.evaluate()["eval_reward"]
        trainer.train()
        return trainer.evaluate()["eval_reward"] - before


def size(options: argparse.Namespace) -> dict[str, int]:
    """Of a step."""
    return {"population_size": options.population, "num_prompts_per_step": options.prompts}


def best_of_grid(subject: Subject, seed: int, options: argparse.Namespace) -> tuple[float, float, float]:
    """Gain, sigma and learning rate."""
    sigmas = [subject.sigma * factor for factor in options.grid]
    grid = [(sigma, sigma * factor) for sigma in sigmas for factor in options.grid]
    return max((gain(subject, *pair, seed, options), *pair) for pair in grid)


def probe(subject: Subject, sigma: float, seed: int, options: argparse.Namespace) -> Probed:
    """Probe until the best sigma is not the end of those that were tried."""
    completions = 0
    for _ in range(MOST_PROBES):
        with tempfile.TemporaryDirectory() as folder:
            args = subject.config(seed, output_dir=folder, sigma=sigma, **size(options))
            found = subject.trainer(args, Probe).run()
        completions += len(found.sigmas) * (options.population + 1) * options.prompts
        if found.sigma is None:
            break
        completions += (1 + len(found.held_out)) * len(subject.held_out)
        if found.sigma not in (found.sigmas[0], found.sigmas[-1]):
            break
        sigma = found.sigma.sigma
    return Probed(found, completions)


def compare(name: str, seed: int, options: argparse.Namespace) -> dict[float, tuple[float, float]]:
    """For each wrong beginning: the gain as a share of the grid's best, and the cost as a share of a run's."""
    chosen = subject(name)
    best, *grid = best_of_grid(chosen, seed, options)
    shares = {}
    for factor in WRONG:
        found, completions = probe(chosen, factor * chosen.sigma, seed, options)
        recommended, gained = "nothing", 0.0  # settings that are wrong by 8 times are not trained with
        if found.learning_rate is not None:
            pair = found.sigma.sigma, found.learning_rate
            recommended, gained = f"{pair[0]:.3g}, {pair[1]:.3g}", gain(chosen, *pair, seed, options)
        shares[factor] = gained / best, completions / (options.steps * options.population * options.prompts)
        print(
            f"{name}, seed {seed}: best of the grid: {grid[0]:.3g}, {grid[1]:.3g}: {best:+.3f}; probe from {factor:g} "
            f"times sigma: {recommended}: {gained:+.3f}, {completions} completions",
            flush=True,
        )
    return shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["letters", "digits"], help="or smollm2, for hours")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--grid", type=float, nargs="+", default=FACTORS, help="sigmas, and learning rates in sigmas")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    logging.getLogger("es_trainer").setLevel(logging.ERROR)
    rows = []
    for name in options.tasks:
        found = [compare(name, seed, options) for seed in options.seeds]
        for factor in WRONG:
            share, cost = (statistics.median(values) for values in zip(*(each[factor] for each in found), strict=True))
            rows.append(f"| {name} | {factor:g} | {share:.0%} | {cost:.0%} |")
    print("| task | probe begins at, times sigma | gain, of the grid's best | completions, of a run's |")
    print("| --- | --- | --- | --- |", *rows, sep="\n")
