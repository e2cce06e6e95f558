"""
Weights in 8 bits (`weight_quantization`) beside bfloat16, on the task of the quickstart:
`python benchmarks/quantized.py`, some ten minutes.

For each kind of storage, a run of SmolLM2-135M-Instruct with masters in host memory: bytes a weight of what members
share, held-out reward before and after as many updates, and seconds a step. Kinds take turns within a seed.
"""

import argparse
import statistics
import tempfile
import time

from es_trainer import ESConfig, ESTrainer
from es_trainer.smollm2 import smollm2
from es_trainer.tasks import conciseness
from es_trainer.weights.quantized import QuantizedMatrix


def run(kind: str, seed: int, options: argparse.Namespace) -> tuple[float, float, float, float]:
    """Bytes a weight, held-out reward before and after, and seconds a step."""
    task = conciseness()
    with tempfile.TemporaryDirectory() as folder:
        args = ESConfig(
            output_dir=folder,
            seed=seed,
            bf16=kind != "float32",
            weight_quantization=kind if kind in ("int8", "fp8") else None,
            master_weights="host",
            population_size=options.population,
            perturbation="low_rank",
            sigma=0.01,
            learning_rate=0.02,
            num_prompts_per_step=options.prompts,
            max_completion_length=16,
            max_steps=options.steps,
            per_device_eval_batch_size=16,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = ESTrainer(
            smollm2(), task.reward_funcs, args, train_dataset=task.train_dataset, eval_dataset=task.eval_dataset
        )
        before = trainer.evaluate()["eval_reward"]
        start = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start) / options.steps
        with trainer.optimizer.weights.in_working_dtype():
            size = bytes_a_weight(trainer)
        return size, before, trainer.evaluate()["eval_reward"], seconds


def bytes_a_weight(trainer: ESTrainer) -> float:
    """Memory of the weights that the model computes with, by the number of these."""
    working = [shard.working for shard in trainer.optimizer.weights.shards]
    stored = sum(w.stored_bytes if isinstance(w, QuantizedMatrix) else w.numel() * w.element_size() for w in working)
    return stored / sum(w.numel() for w in working)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["bfloat16", "int8", "fp8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--population", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=8)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in options.kinds}
    for seed in options.seeds:
        for kind in options.kinds:
            found[kind].append(run(kind, seed, options))
            size, before, after, seconds = found[kind][-1]
            print(
                f"{kind}, seed {seed}: {size:.3f} bytes a weight; held-out reward {before:.2f} -> {after:.2f}; "
                f"{seconds:.1f} s a step",
                flush=True,
            )
    for kind, runs in found.items():
        *_, after, seconds = map(statistics.median, zip(*runs, strict=True))
        print(
            f"{kind}, median of {len(runs)}: held-out reward {after:.2f} after {options.steps} steps; {seconds:.1f} s"
        )
