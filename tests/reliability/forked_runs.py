"""
Training runs that are killed where it hurts: `forked_runs.py MODEL RUNS`, where RUNS is a JSON list of `Run`s. Each is
one or more processes, forked from this one, which has imported everything. Prints their exit statuses as JSON.
"""

import atexit
import functools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import TINY_RUN, letters
from datasets import Dataset
from test_distributed import free_port

from es_trainer import ESConfig, ESTrainer
from es_trainer.overrides import checkpoints


CONFIG = {
    **TINY_RUN,
    "bf16": True,
    "population_size": 6,
    "es_optimizer": "adam",
    "anchor_decay": 0.1,
    "num_prompts_per_step": 2,
    "per_device_train_batch_size": None,
    "num_generations": 2,
    "temperature": 1.0,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "lr_scheduler_type": "linear",
}
PATIENCE = 60  # seconds that a process has to end after another was killed


@dataclass
class Run:
    """A run, and in which phase of which step a process of it is killed. Steps count from 1."""

    output_dir: str
    processes: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    phase: str | None = None
    step: int = 3
    rank: int = 0
    resume: bool = False


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Let `around` do what a method does, with the method as its first argument."""
    setattr(owner, name, functools.partial(around, getattr(owner, name)))


def kill_in(trainer: ESTrainer, phase: str, step: int) -> None:
    """Kill this process in a phase of a step."""

    def now() -> bool:
        return trainer.state.global_step + 1 == step

    def saving() -> bool:
        return trainer.state.global_step == step

    def after(it_is_time: Callable[[], bool]) -> Callable[..., Any]:
        def around(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if it_is_time():
                kill()
            return result

        return around

    def in_exchange(method: Callable[..., Any], work: Callable[[], Any]) -> Any:
        return method(lambda: (work(), now() and scored and kill())[0])

    def in_line(method: Callable[..., Any], line: dict[str, Any]) -> None:
        if now():
            with trainer.history.path.open("a") as file:
                file.write(json.dumps(line)[:200])
            kill()
        method(line)

    def before_checksums(method: Callable[..., Any], folder: Path) -> None:
        if saving():
            kill()
        method(folder)

    scored: list[int] = []
    wrapped(trainer.completions, "keep", lambda method, *args: (scored.append(1), method(*args))[1])
    if phase == "ask":
        wrapped(trainer.optimizer, "ask", after(now))
    elif phase == "generate":
        wrapped(trainer.engine, "_generate_batch", after(now))
    elif phase == "score":
        wrapped(trainer.scorer, "begin", after(now))
    elif phase == "exchange":
        wrapped(trainer.processes, "exchange", in_exchange)
    elif phase == "update":
        wrapped(trainer.recorder, "_measure_update", after(now))
    elif phase == "record":
        wrapped(trainer.history, "append", in_line)
    elif phase == "save model":
        wrapped(trainer, "_save", after(saving))
    elif phase == "save state":
        wrapped(checkpoints, "save_state", after(saving))
    elif phase == "save checksums":
        wrapped(checkpoints, "write_checksums", before_checksums)
    elif phase == "push":
        wrapped(trainer, "_push_from_checkpoint", after(saving))  # the upload goes on in another thread
    else:
        raise ValueError(phase)


def train(model: str, run: Run, rank: int) -> None:
    torch.set_num_threads(1)
    seen = open(f"{run.output_dir}.{rank}.seen", "w")

    def reward(completions, trainer_state, **kwargs):
        print(trainer_state.global_step + 1, file=seen, flush=True)
        return letters(completions)

    dataset = Dataset.from_dict({"prompt": [f"Say {word}" for word in "one two three four five".split()]})
    trainer = ESTrainer(model, reward, ESConfig(run.output_dir, **{**CONFIG, **run.config}), dataset)
    if run.phase is not None and rank == run.rank:
        kill_in(trainer, run.phase, run.step)
    trainer.train(resume_from_checkpoint=run.resume or None)
    trainer.save_model(f"{run.output_dir}/final")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def child(model: str, run: Run, rank: int, port: int) -> None:
    log = os.open(f"{run.output_dir}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if run.processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run.processes}
        os.environ |= {key: str(value) for key, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = 1
    try:
        train(model, run, rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(status)


def start(model: str, run: Run) -> list[int]:
    """The ids of its processes."""
    Path(run.output_dir).parent.mkdir(parents=True, exist_ok=True)
    port, pids = free_port(), []
    for rank in range(run.processes):
        pid = os.fork()
        if pid == 0:
            child(model, run, rank, port)
        pids.append(pid)
    return pids


def wait(pids: list[int]) -> list[int | None]:
    """How processes end: an exit status, minus the number of a signal, or `None` if one hangs."""
    found: dict[int, int | None] = {}
    end = time.monotonic() + 3 * PATIENCE
    while len(found) < len(pids):
        for pid in set(pids) - found.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                found[pid] = os.waitstatus_to_exitcode(status)
                end = time.monotonic() + PATIENCE
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                found[pid] = None
        time.sleep(0.02)
    return [found[pid] for pid in pids]


if __name__ == "__main__":
    model, runs = sys.argv[1], [Run(**options) for options in json.loads(sys.argv[2])]
    print(json.dumps([wait(start(model, run)) for run in runs]))
