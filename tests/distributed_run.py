"""Training runs in processes of a launcher: `distributed_run.py MODEL RUNS`, where RUNS is a JSON list of `Run`s."""

import importlib.metadata
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from conftest import TINY_RUN, letters, make_model, make_tokenizer
from datasets import Dataset
from peft import LoraConfig

from es_trainer import ESConfig, ESTrainer
from es_trainer.agents import Endpoint
from es_trainer.rewards import per_member
from es_trainer.run import fingerprint


RANK, LAST = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) - 1
WORDS = "one two three four five six seven".split()


@dataclass
class Run:
    """A run, what goes wrong in it, and where. Steps count from 1; `last` is the last process."""

    output_dir: str
    config: dict[str, Any] = field(default_factory=dict)
    config_of_last: dict[str, Any] = field(default_factory=dict)
    words_of_last: list[str] = field(default_factory=lambda: WORDS)
    model_of_last: dict[str, Any] = field(default_factory=dict)  # and all make the model themselves
    model_object: bool = False  # every process makes the model itself, with other weights
    model_options: dict[str, Any] = field(default_factory=dict)  # of that
    adapter: bool = False
    judge: bool = False  # a reward model, too
    of_set: bool = False  # a reward of all completions of a member, too
    stream: bool = False  # an iterable dataset
    program: bool = False  # that asks the model, in place of the trainer
    resume: str | None = None
    evaluate: bool = False
    spoil_at: int | None = None  # after this step, last changes a weight
    fail_at: int | None = None  # in this step, the reward raises on last, or on the process `fail_rank`
    fail_rank: int | None = None
    kill_at: int | None = None  # in this step, the process `kill_rank` is killed
    kill_rank: int = 1
    version_of_last: str | None = None  # what last takes for its version of numpy
    delay_of_last: float = 0.0  # seconds that last takes longer for a group of members


def train(model: str, run: Run) -> None:
    torch.set_num_threads(1)  # as in all processes: a reward model's last digits hang on the number of threads
    last = RANK == LAST > 0
    options = {
        **TINY_RUN,
        "population_size": 7,
        "num_prompts_per_step": 3,
        "per_device_eval_batch_size": 2,
        **run.config,
        **(run.config_of_last if last else {}),
    }
    args = ESConfig(run.output_dir, **options)
    if last and run.version_of_last:
        version = fingerprint.version
        fingerprint.version = lambda package: run.version_of_last if package == "numpy" else version(package)
    dataset, other = (
        Dataset.from_dict({"prompt": [f"Say {word}" for word in words]}) for words in (WORDS, run.words_of_last)
    )
    if not last:
        other = dataset
    members: list[int] = []  # of which this process had completions, by step
    trainer = ESTrainer(
        make_model(seed=RANK, **run.model_options, **(run.model_of_last if last else {}))
        if run.model_object
        else model,
        None
        if run.program
        else [
            reward(run, last, members),
            *([f"{model}/judge"] if run.judge else []),
            *([distinct] if run.of_set else []),
        ],
        args,
        other.to_iterable_dataset() if run.stream else other,
        dataset,
        make_tokenizer() if run.model_object else None,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if run.adapter else None,
        agent_func=ask_twice if run.program else None,
    )
    if last and run.delay_of_last:
        delay(trainer, run.delay_of_last)
    if last and run.spoil_at is not None:
        spoil(trainer, run.spoil_at)
    trainer.train(resume_from_checkpoint=run.resume)
    evaluated = len(members)
    metrics = trainer.evaluate() if run.evaluate else None
    trainer.save_model(f"{run.output_dir}/final")
    record = {"history": trainer.state.log_history, "evaluation": metrics, "evaluated": evaluated}
    (Path(run.output_dir) / f"record-{RANK}.json").write_text(json.dumps(record))


def reward(run: Run, last: bool, members: list[int]) -> Callable[..., list[float]]:
    def scored(completions, trainer_state, **kwargs):
        step = trainer_state.global_step + 1
        members.append(step)
        if RANK == run.kill_rank and step == run.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == run.fail_at and (last if run.fail_rank is None else RANK == run.fail_rank):
            raise ValueError("no reward today")
        return letters(completions)

    scored.__name__ = "letters"
    return scored


@per_member
def distinct(completions, **kwargs) -> float:
    """Pairs of equal neighbours tell the order, too."""
    texts = "".join(completions)
    return len(set(texts)) + sum(a == b for a, b in itertools.pairwise(texts)) / 100


def ask_twice(example: dict[str, Any], endpoint: Endpoint) -> float:
    text = example["prompt"]
    with httpx.Client(headers={"Authorization": f"Bearer {endpoint.api_key}"}, timeout=60) as client:
        for _ in range(2):
            reply = client.post(f"{endpoint.base_url}/completions", json={"model": endpoint.model, "prompt": text})
            text += reply.json()["choices"][0]["text"]
    return float(sum(map(str.islower, text)))


def delay(trainer: ESTrainer, seconds: float) -> None:
    generate = trainer.engine.generate_each

    def slowly(*args, **kwargs):
        time.sleep(seconds)
        return generate(*args, **kwargs)

    trainer.engine.generate_each = slowly


def spoil(trainer: ESTrainer, step: int) -> None:
    def change(optimizer, *_):
        if optimizer.updates == step:
            optimizer.weights.shards[3].trained[5] += 1e-6

    trainer.optimizer.register_step_post_hook(change)
    # Before the trainer looks
    hooks = trainer.optimizer._optimizer_step_post_hooks
    hooks.move_to_end(next(reversed(hooks)), last=False)


if __name__ == "__main__":
    for options in json.loads(sys.argv[2]):
        try:
            train(sys.argv[1], Run(**options))
        except Exception as error:
            # All processes get here, and go on with the next run
            folder = Path(options["output_dir"])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"error-{RANK}.txt").write_text(f"{type(error).__name__}: {error}")
            fingerprint.version = importlib.metadata.version
