"""
Peak memory of a step, each in a process of its own: `python benchmarks/memory.py`.

Counts what a process allocates (resident minus shared pages, sampled every 5 ms) above what the imports take.
"""

import argparse
import subprocess
import sys
import tempfile
import threading

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from es_trainer import ESConfig, ESTrainer
from es_trainer.engines import TransformersEngine
from es_trainer.smollm2 import smollm2
from es_trainer.tasks import conciseness


POPULATION, PROMPTS, TOKENS = 8, 2, 32
MIB = 2**20


class Peak:
    """The most memory that the process allocates inside a `with` block, above what it had before."""

    def __enter__(self) -> "Peak":
        self.before = self.now()
        self.highest = self.before
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()

    @staticmethod
    def now() -> int:
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.highest = max(self.highest, self.now())

    @property
    def mib(self) -> float:
        return (self.highest - self.before) / MIB


def shared_options(folder: str) -> dict:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "max_completion_length": TOKENS,
        "generation_kwargs": {"min_new_tokens": TOKENS},
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def inference(folder: str) -> None:
    """Load the model and complete the prompts: what any method needs."""
    task = conciseness(train_size=PROMPTS)
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # from the mapped file into memory
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    engine = TransformersEngine(model, tokenizer, ESConfig(**shared_options(folder)))
    engine.generate(engine.tokenize(list(task.train_dataset["prompt"])), seed=0)


def es(folder: str, **options) -> None:
    task = conciseness(train_size=PROMPTS)
    args = ESConfig(**shared_options(folder), population_size=POPULATION, num_prompts_per_step=PROMPTS, **options)
    ESTrainer(smollm2(), task.reward_funcs, args, task.train_dataset).train()


def grpo(folder: str) -> None:
    task = conciseness(train_size=PROMPTS)
    args = GRPOConfig(
        **shared_options(folder), num_generations=POPULATION, per_device_train_batch_size=POPULATION * PROMPTS
    )
    GRPOTrainer(smollm2(), task.reward_funcs, args, task.train_dataset).train()


SUBJECTS = {
    "inference": inference,
    "es": es,
    "es, master_weights=none": lambda folder: es(folder, master_weights="none"),
    "es, momentum": lambda folder: es(folder, es_optimizer="momentum"),
    "es, adam": lambda folder: es(folder, es_optimizer="adam"),
    "grpo": grpo,
}


def measure(subject: str) -> float:
    """MiB that the subject takes, in a process of its own."""
    output = subprocess.run([sys.executable, __file__, "--subject", subject], capture_output=True, text=True)
    if output.returncode != 0:
        raise RuntimeError(f"{subject!r} failed:\n{output.stderr}")
    return float(output.stdout.splitlines()[-1])


def report() -> None:
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(smollm2()).parameters())
    peaks = {subject: measure(subject) for subject in SUBJECTS}
    per_weight = 4 * weights / MIB
    print(f"SmolLM2-135M in float32 (4 bytes a weight: {per_weight:.0f} MiB), {POPULATION * PROMPTS} completions")
    extra = {"es": 1, "es, master_weights=none": 0, "es, momentum": 2, "es, adam": 3}
    for subject, peak in peaks.items():
        line = f"{subject}: {peak:.0f} MiB"
        if subject in extra:
            expected = peaks["inference"] + extra[subject] * per_weight
            line += f" ({peak / expected - 1:+.0%} of weights + rollout + {4 * extra[subject]} bytes a weight)"
        print(line)
    print(f"grpo over es: {peaks['grpo'] / peaks['es']:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=SUBJECTS, help="measure one in this process")
    subject = parser.parse_args().subject
    if subject is None:
        report()
    else:
        with tempfile.TemporaryDirectory() as folder, Peak() as peak:
            SUBJECTS[subject](folder)
        print(peak.mib)
