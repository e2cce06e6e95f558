"""Training runs in processes of a launcher: `distributed_run.py MODEL RUNS`, where RUNS is a JSON list of options.

A run is an `ESConfig` for the options that it has, and a few of its own; see `Run`.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import letters, make_model, make_tokenizer
from datasets import Dataset
from peft import LoraConfig

from es_trainer import ESConfig, ESTrainer


WORDS = "one two three four five six seven".split()


@dataclass
class Run:
    """One training run."""

    output_dir: str
    config: dict[str, Any] = field(default_factory=dict)
    model_object: bool = False  # make the model here, with other weights on each process
    adapter: bool = False
    stream: bool = False  # an iterable dataset
    resume: str | None = None
    rank_options: dict[str, dict[str, Any]] = field(default_factory=dict)  # by rank: what differs there
    spoil_at: int | None = None  # step after which the last process changes a weight
    fail_at: int | None = None  # step in which the reward raises on the last process
    kill_at: int | None = None  # step in which the last process is killed
    evaluate: bool = False


def reward(run: Run, rank: int):
    last = rank == int(os.environ.get("WORLD_SIZE", 1)) - 1

    def scored(completions, trainer_state, **kwargs):
        step = trainer_state.global_step + 1
        if last and step == run.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if last and step == run.fail_at:
            raise ValueError("a reward that fails")
        return letters(completions)

    scored.__name__ = "letters"
    return scored


def train(model: str, run: Run) -> None:
    rank = int(os.environ.get("RANK", 0))
    options = {
        "use_cpu": True,
        "bf16": False,
        "population_size": 7,
        "sigma": 0.05,
        "learning_rate": 0.02,
        "num_prompts_per_step": 3,
        "max_completion_length": 8,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        **run.config,
        **run.rank_options.get(str(rank), {}),
    }
    words = options.pop("words", WORDS)
    args = ESConfig(run.output_dir, **options)
    dataset = Dataset.from_list([{"prompt": f"Say {word}"} for word in words])
    trainer = ESTrainer(
        make_model(seed=rank) if run.model_object else model,
        reward(run, rank),
        args,
        dataset.to_iterable_dataset() if run.stream else dataset,
        dataset,
        make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if run.adapter else None,
    )
    if run.spoil_at is not None and rank == args.world_size - 1:
        spoil(trainer, run.spoil_at)
    trainer.train(resume_from_checkpoint=run.resume)
    metrics = trainer.evaluate() if run.evaluate else None
    trainer.save_model(f"{run.output_dir}/final")
    if trainer.is_world_process_zero():
        logs = {"history": trainer.state.log_history, "evaluation": metrics}
        (Path(run.output_dir) / "logs.json").write_text(json.dumps(logs))


def spoil(trainer: ESTrainer, step: int) -> None:
    def change(optimizer, *_):
        if optimizer.updates == step:
            optimizer.weights.shards[3].trained[5] += 1e-6

    trainer.optimizer.register_step_post_hook(change)
    hooks = trainer.optimizer._optimizer_step_post_hooks
    hooks.move_to_end(next(reversed(hooks)), last=False)  # before the trainer looks


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    for options in json.loads(sys.argv[2]):
        train(sys.argv[1], Run(**options))
