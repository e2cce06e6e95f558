"""
ESTrainer against TRL's GRPOTrainer: `python benchmarks/vs_grpo.py`.

One dataset, one reward, one model (SmolLM2-135M-Instruct), all weights trained, and the same number of completions per
step: 8 prompts with 30 completions of up to 32 tokens each, which are 30 members with one completion per prompt for
ESTrainer. Each trainer runs in a process of its own. GRPOTrainer takes `--steps` steps; ESTrainer goes on until it has
taken as many steps and as many seconds. After every step all of them answer the held-out questions greedily, which is
not counted. Writes a table to standard output and a picture to `--picture`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from memory import MIB, Peak
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from es_trainer import ESConfig, ESTrainer
from es_trainer.engines import TransformersEngine
from es_trainer.smollm2 import smollm2
from es_trainer.tasks import Task, conciseness


PROMPTS, COMPLETIONS, TOKENS = 8, 30, 32
CUDA = torch.cuda.is_available()


class Course(TrainerCallback):
    """Seconds of each step, the held-out reward after it, and when to stop."""

    def __init__(self, task: Task, steps: int, seconds: float):
        self.task, self.steps, self.seconds = task, steps, seconds
        self.greedy = ESConfig("unused", use_cpu=not CUDA, max_completion_length=TOKENS, report_to="none")
        self.step_seconds: list[float] = []
        self.rewards: list[float] = []

    def held_out(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        """Mean reward of greedy answers to the questions that nothing is trained on."""
        training = model.training
        model.eval()
        engine = TransformersEngine(model, tokenizer, self.greedy)
        rows = self.task.eval_dataset
        completions = engine.generate(engine.tokenize(list(rows["prompt"])), seed=0)
        model.train(training)
        (reward,) = self.task.reward_funcs
        return statistics.fmean(reward([completion.text for completion in completions], answer=list(rows["answer"])))

    def on_train_begin(self, args, state, control, model, processing_class, **kwargs):
        self.rewards.append(self.held_out(model, processing_class))

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, model, processing_class, **kwargs):
        if CUDA:
            torch.cuda.synchronize()
        self.step_seconds.append(time.perf_counter() - self.start)
        self.rewards.append(self.held_out(model, processing_class))
        enough = len(self.step_seconds) >= self.steps and sum(self.step_seconds) >= self.seconds
        control.should_training_stop = enough


def train(method: str, dtype: str, steps: int, seconds: float, grpo_learning_rate: float) -> dict[str, Any]:
    task = conciseness()
    course = Course(task, steps, seconds)
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "output_dir": folder,
            "use_cpu": not CUDA,
            "bf16": dtype == "bf16",
            "max_completion_length": TOKENS,
            "max_steps": 1000,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        if method == "grpo":
            args = GRPOConfig(
                **shared,
                learning_rate=grpo_learning_rate,
                num_generations=COMPLETIONS,
                per_device_train_batch_size=COMPLETIONS,
                gradient_accumulation_steps=PROMPTS,
            )
            trainer_class = GRPOTrainer
        else:
            args = ESConfig(
                **shared,
                perturbation=method,
                sigma=0.01,
                learning_rate=0.02,
                population_size=COMPLETIONS,
                num_prompts_per_step=PROMPTS,
            )
            trainer_class = ESTrainer
        trainer = trainer_class(smollm2(), task.reward_funcs, args, task.train_dataset, callbacks=[course])
        trainer.train()
    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "loss" in log]
    return {
        "step_seconds": course.step_seconds,
        "rewards": course.rewards,
        "mean_length": statistics.fmean(lengths[:steps]),
    }


def run(method: str, options: argparse.Namespace, dtype: str, seconds: float = 0.0) -> dict[str, Any]:
    """Train in a process of its own."""
    command = [sys.executable, __file__, "--method", method, "--dtype", dtype, "--steps", str(options.steps)]
    command += ["--seconds", str(seconds), "--grpo_learning_rate", str(options.grpo_learning_rate)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(f"{dtype} {method}: {output.splitlines()[-1]}", file=sys.stderr, flush=True)
    return json.loads(output.splitlines()[-1])


def report(options: argparse.Namespace) -> None:
    courses = {}
    for dtype in options.dtypes:
        courses[dtype, "grpo"] = run("grpo", options, dtype)
        seconds = sum(courses[dtype, "grpo"]["step_seconds"])
        for method in ("gaussian", "low_rank"):
            courses[dtype, method] = run(method, options, dtype, seconds)

    print("| | s / step | completions / s | peak MiB | held-out reward: before | equal completions | equal seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (dtype, method), course in courses.items():
        name = "`GRPOTrainer`" if method == "grpo" else f'`ESTrainer`, `"{method}"`'
        step = statistics.median(course["step_seconds"][: options.steps])
        limit = sum(courses[dtype, "grpo"]["step_seconds"])
        done = sum(seconds <= limit for seconds in cumulative(course["step_seconds"]))
        print(
            f"| {name}, {dtype} | {step:.1f} | {PROMPTS * COMPLETIONS / step:.2f} | {course['peak']:.0f} "
            f"| {course['rewards'][0]:.1f} | {course['rewards'][options.steps]:.1f} | {course['rewards'][done]:.1f} |"
        )
    for (dtype, method), course in courses.items():
        grpo = courses[dtype, "grpo"]
        faster = speed(course, options.steps) / speed(grpo, options.steps)
        print(
            f"{dtype}, {method}: {faster:.1f} times the completions per second of GRPOTrainer, "
            f"{course['peak'] / grpo['peak']:.0%} of its memory; {course['mean_length']:.1f} tokens a completion in "
            f"the first {options.steps} steps; {len(course['step_seconds'])} steps"
        )
    draw(courses, options.picture)


def speed(course: dict[str, Any], steps: int) -> float:
    return 1 / statistics.median(course["step_seconds"][:steps])


def cumulative(seconds: list[float]) -> list[float]:
    return [sum(seconds[: i + 1]) for i in range(len(seconds))]


def draw(courses: dict[tuple[str, str], dict[str, Any]], path: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(dtype for dtype, _ in courses))
    figure = Figure(figsize=(5 * len(dtypes), 3.5), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        for (other, method), course in courses.items():
            if other == dtype:
                label = "GRPOTrainer" if method == "grpo" else f"ESTrainer, {method}"
                axes.plot([0, *cumulative(course["step_seconds"])], course["rewards"], marker=".", label=label)
        axes.set(title=dtype, xlabel="seconds of training", ylabel="held-out reward")
        axes.grid(alpha=0.3)
        axes.legend()
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="steps of GRPOTrainer")
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--grpo_learning_rate", type=float, default=1e-5)
    parser.add_argument("--picture", default="vs_grpo.png")
    parser.add_argument("--method", choices=["grpo", "gaussian", "low_rank"], help="run one in this process")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--seconds", type=float, default=0.0, help="least seconds of training of --method")
    options = parser.parse_args()
    if options.method is None:
        report(options)
    else:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        with Peak() as peak:
            course = train(options.method, options.dtype, options.steps, options.seconds, options.grpo_learning_rate)
        course["peak"] = torch.cuda.max_memory_allocated() / MIB if CUDA else peak.mib
        print(json.dumps(course))
