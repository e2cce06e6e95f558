"""
Members into vLLM's adapter slots: `python benchmarks/vllm_slots.py` where vLLM is installed.

SmolLM2-135M-Instruct with 30 members of rank 1. Printed are the seconds until all of them have been installed, as a
median of rounds: those of `install`, and those by which the first answers of a token from each member take longer than
further ones (what vLLM loads by itself).
"""

import argparse
import statistics
import sys
import tempfile
import time


sys.path.pop(0)  # this folder, whose files would be taken for other modules

import torch

from es_trainer import ESConfig, ESTrainer
from es_trainer.engines.decoding import Row
from es_trainer.smollm2 import smollm2
from es_trainer.tasks import conciseness


def measure(options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of each round for `install`, and for what the first answers take longer."""
    task = conciseness()
    with tempfile.TemporaryDirectory() as folder:
        args = ESConfig(
            folder,
            use_cpu=not torch.cuda.is_available(),
            bf16=options.dtype == "bfloat16",
            population_size=options.population,
            max_completion_length=1,
            vllm_max_model_length=512,
            max_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_vllm=True,
            perturbation="low_rank",
            vllm_lora=True,
        )
        trainer = ESTrainer(smollm2(), task.reward_funcs, args, task.train_dataset)
        ids = trainer.engine.tokenize(list(task.train_dataset["prompt"])[:1]) * options.population
        rows = [Row(member, 0, 0) for member in range(options.population)]
        rounds = [one_round(trainer, ids, rows) for _ in range(options.rounds + 1)][1:]  # the first warms up
    return tuple(zip(*rounds, strict=True))


def one_round(trainer: ESTrainer, ids: list[list[int]], rows: list[Row]) -> tuple[float, float]:
    population = trainer.optimizer.ask()
    times = [time.perf_counter()]
    with trainer.population_batch.install(population.members, trainer.args.sigma) as installed:
        times.append(time.perf_counter())
        for _ in range(2):
            trainer.engine.complete(ids, rows, 0, installed)
            times.append(time.perf_counter())
    install, first, second = (stop - start for start, stop in zip(times, times[1:], strict=False))
    return install, first - second


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    install, load = map(statistics.median, measure(options))
    print(f"{options.dtype}, {options.population} members: install {install:.3f} s, first answers {load:+.3f} s")
