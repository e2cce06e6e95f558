"""One run, in a process of its own. Its file and a checkpoint are written after every measurement."""

import json
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from benchmarks.memory import MIB, Peak
from es_trainer import ESConfig, ESTrainer

from .judge import Judge
from .results import path_of, read
from .starts import STARTS
from .studies import STUDIES, completions_of_a_step
from .tasks import TASKS, other_than


class Record(TrainerCallback):
    """
    Measures the model along a run, ends the run with its budget, and keeps the file.

    Args:
        path (`Path`):
            The file.
        about (`dict[str, Any]`):
            What is written beside the history.
        judge ([`Judge`]):
            Measures.
        step (`int`):
            Completions of a step.
        budget (`int`):
            Completions of the run.
        measured (`int`):
            Completions between two measurements.
        samples (`bool`):
            Whether the first and the last measurement are of samples, too.
    """

    def __init__(
        self, path: Path, about: dict[str, Any], judge: Judge, step: int, budget: int, measured: int, samples: bool
    ):
        self.path, self.about, self.judge = path, about, judge
        self.step, self.budget, self.measured, self.samples = step, budget, measured, samples
        self.seconds, self.peak = 0.0, 0.0
        self.history: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, model, processing_class, **kwargs):
        if state.global_step == 0:
            self._measure(0, model, processing_class)
        else:
            self._go_on(state.global_step * self.step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = time.perf_counter()
        self.watch = Peak()
        self.watch.__enter__()

    def on_step_end(self, args, state, control, model, processing_class, **kwargs):
        self.seconds += time.perf_counter() - self.begin
        self.watch.__exit__()
        self.peak = max(self.peak, self.watch.highest / MIB)
        completions = state.global_step * self.step
        if completions // self.measured > (completions - self.step) // self.measured or completions >= self.budget:
            self._measure(completions, model, processing_class)
            control.should_save = completions < self.budget
        control.should_training_stop = completions >= self.budget

    def _go_on(self, completions: int) -> None:
        """With what was measured up to the checkpoint."""
        self.history = [entry for entry in read(self.path)["history"] if entry["completions"] <= completions]
        self.seconds, self.peak = (self.history[-1][key] for key in ("seconds", "peak_mib"))

    def _measure(self, completions: int, model, tokenizer) -> None:
        done = completions >= self.budget
        ends = done or completions == 0
        found = self.judge.measure(model, tokenizer, samples=self.samples and ends)
        self.history.append({"completions": completions, "seconds": self.seconds, "peak_mib": self.peak, **found})
        self.path.write_text(json.dumps(self.about | {"done": done, "history": self.history}, indent=1) + "\n")


def run(study_name: str, name: str, seed: int, choice: Any) -> None:
    """
    Train and measure. What was interrupted goes on from its last checkpoint.

    Args:
        study_name (`str`):
            The study.
        name (`str`):
            Its arm.
        seed (`int`):
            Seed of the trainer and of the order of the prompts.
        choice (`Any`):
            Value of the arm's setting that is chosen.
    """
    study = STUDIES[study_name]
    arm = study.arms[name]
    settings = arm.settings | ({arm.tuned: choice} if arm.tuned else {})
    about = {
        "task": study.task,
        "trainer": arm.trainer,
        "reward": arm.reward,
        "start": arm.start,
        "seed": seed,
        "settings": settings,
    }
    path = path_of(study_name, name, seed, choice)
    path.parent.mkdir(parents=True, exist_ok=True)
    task = TASKS[study.task]
    judge = Judge(task, other_than(study.task))
    # Before the config, which resets Accelerate's state: the model of the start may be trained here
    inputs = STARTS[arm.start]() | task.inputs(arm.trainer, seed, arm.reward)
    checkpoints = path.with_suffix("")  # not committed
    checkpoint = last_of(checkpoints)
    args = CONFIGS[arm.trainer](
        output_dir=str(checkpoints),
        seed=seed,
        use_cpu=True,
        bf16=True,
        max_completion_length=task.tokens,
        max_steps=10_000,
        save_strategy="no",
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        logging_steps=10_000,
        **settings,
    )
    record = Record(
        path,
        about | machine(),
        judge,
        step=completions_of_a_step(settings),
        budget=study.budgets[arm.trainer],
        measured=study.measured(arm.trainer),
        samples=study.samples,
    )
    trainer = TRAINERS[arm.trainer](args=args, callbacks=[record], **inputs)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    shutil.rmtree(checkpoints)


def last_of(checkpoints: Path) -> str | None:
    """The checkpoint that a run goes on from. A run that was interrupted before its first one begins anew."""
    if not checkpoints.exists():
        return None
    last = get_last_checkpoint(checkpoints)
    if last is None:
        shutil.rmtree(checkpoints)
    return last


def es_config(**settings: Any) -> ESConfig:
    return ESConfig(**settings, evaluate_center=False, log_format="dict")


def grpo_config(**settings: Any) -> GRPOConfig:
    # Faster without checkpoints of activations, and prompts this short need little memory for them
    return GRPOConfig(**settings, lr_scheduler_type="constant", gradient_checkpointing=False)


CONFIGS = {"es": es_config, "grpo": grpo_config}
TRAINERS = {"es": ESTrainer, "grpo": GRPOTrainer}


def machine() -> dict[str, Any]:
    """What the figures depend on beside the settings."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cores": psutil.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "es-trainer")},
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
