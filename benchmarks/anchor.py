"""
What `anchor_decay` costs and keeps: `python benchmarks/anchor.py`, 20 minutes on two cores.

SmolLM2 learns to sort messages of customers (the task of macro_f1.py, rewarded by the share of right answers). Printed
are held-out reward and drift at the end of runs with several strengths of the pull towards the initial weights, as
medians over the seeds. The drift is the KL divergence of next-token distributions from those of the start, on the
task's prompts and on texts about other things (`eval_kl_prompts`). A strength is the part of the distance from the
start that a step takes back: `learning_rate * anchor_decay`.
"""

import argparse
import logging
import statistics
import tempfile

from datasets import Dataset
from macro_f1 import HELD_OUT, accuracy, messages, settings
from texts import TEXTS
from transformers import PrinterCallback

from es_trainer import ESConfig, ESTrainer
from es_trainer.smollm2 import smollm2


def reward(completions, kind, **kwargs) -> list[float] | list[None]:
    """The share of right answers; texts have none."""
    return accuracy(completions, kind) if kind[0] is not None else [None] * len(completions)


def run(options: argparse.Namespace, seed: int, strength: float) -> tuple[float, float, float]:
    """Held-out reward, and the drift on the task and on texts."""
    texts = Dataset.from_list([{"prompt": text, "kind": None} for text in TEXTS])
    sets = {"task": messages(options.held_out, HELD_OUT), "texts": texts}
    with tempfile.TemporaryDirectory() as folder:
        args = ESConfig(
            output_dir=folder,
            seed=seed,
            **settings(options),
            anchor_decay=strength / options.sigma,
            evaluate_center=False,
            eval_kl_prompts=len(TEXTS),
            log_format="dict",
            disable_tqdm=True,
        )
        trainer = ESTrainer(smollm2(), reward, args, messages(1024, seed << 10), sets)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found = trainer.evaluate()
    return found["eval_task_reward"], found["eval_task_kl"], found["eval_texts_kl"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.03, 0.1, 0.3])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--population", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--held_out", type=int, default=64)
    parser.add_argument("--sigma", type=float, default=0.005)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    logging.getLogger("es_trainer").setLevel(logging.ERROR)
    print("| learning_rate * anchor_decay | held-out reward | KL on the task | KL on other texts |")
    print("| --- | --- | --- | --- |")
    for strength in options.strengths:
        runs = [run(options, seed, strength) for seed in options.seeds]
        medians = [statistics.median(values) for values in zip(*runs, strict=True)]
        print(f"| {strength:g} | " + " | ".join(f"{value:.3f}" for value in medians) + " |", flush=True)
