"""
Two processes against one, on CPU: `python benchmarks/scaling.py [--parts time memory traffic]`.

Every process has one thread. The model is SmolLM2-135M. `time` is a step of a population whose members' completions
have random lengths, each way in turn, medians over the rounds; `memory` the peak of each process in a step with
partitioned weights that are never gathered as a whole; `traffic` what is sent in a step, by the counters of the
loopback interface.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import yaml
from memory import MIB, Peak
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

from es_trainer import ESConfig, ESTrainer
from es_trainer.evolution import Member
from es_trainer.rollout import Generations
from es_trainer.run.metrics import summarize
from es_trainer.smollm2 import smollm2
from es_trainer.tasks import conciseness


RECIPES = Path(__file__).parents[1] / "recipes" / "accelerate_configs"
RESULT = "RESULT "
# The second gives freed memory back, which glibc would keep in pieces: it is not in use
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
WAYS = {
    "one": "one process",
    "two": "two processes",
    "static": "two, fixed shares of the population",
    "gathered": "two, ZeRO-3, gathered once a step",
    "split": "two, ZeRO-3, gathered for each member, prompts split",
}


class StaticShare:
    """In place of the queue: half of the members for each process, whoever is done first."""

    def __init__(self, size: int, rank: int, count: int):
        self.items = iter(range(rank * size // count, (rank + 1) * size // count))

    def take(self, count: int = 1) -> range:
        item = next(self.items, None)
        return range(0) if item is None else range(item, item + 1)

    def __enter__(self) -> "StaticShare":
        return self

    def __exit__(self, *error) -> None:
        pass


class SplitPrompts(ESTrainer):
    """The other way to generate with gathered weights: all processes evaluate the same member, on half the prompts."""

    def _evaluate_population(self, population, rows):
        rank, count = self.processes.rank, self.processes.count
        rows = rows[rank::count]
        prompt_ids = self.engine.tokenize([row["prompt"] for row in rows])
        rewards, summaries = [], []
        for member in population:
            with self._timed_noise():
                self.optimizer.perturb(member)
            with self.optimizer.weights.gathered(masters=False):
                (score,) = self._generate(rows, prompt_ids, seed=0)
            rollout = score()()
            parts = self.processes.exchange(
                lambda rollout=rollout: summarize(rollout, rollout.prompt_rewards(Generations(), 1))
            )
            rewards.append([reward for part in parts for reward in part.rewards])
            summaries += parts
        return np.array(rewards), summaries


class StepTimes(TrainerCallback):
    """Seconds of each step, and bytes that were sent in it beyond what launcher and machine send anyhow."""

    def __init__(self, idle_seconds: float = 0.0):
        self.seconds: list[float] = []
        self.sent: list[float] = []
        self.idle_seconds = idle_seconds

    def on_train_begin(self, *args, **kwargs) -> None:
        before = sent_bytes()
        time.sleep(self.idle_seconds)
        self.idle_rate = (sent_bytes() - before) / max(self.idle_seconds, 1)

    def on_step_begin(self, *args, **kwargs) -> None:
        self.start, self.before = time.perf_counter(), sent_bytes()

    def on_optimizer_step(self, *args, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.sent.append(sent_bytes() - self.before - self.idle_rate * self.seconds[-1])


def sent_bytes() -> int:
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


def trainer(options: argparse.Namespace, folder: str, model: str | PreTrainedModel = "", **config) -> ESTrainer:
    task = conciseness(train_size=options.prompts)
    args = ESConfig(
        folder,
        use_cpu=True,
        bf16=options.dtype == "bfloat16",
        population_size=options.population,
        seed=options.seed,
        num_prompts_per_step=options.prompts,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **config,
    )
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    kind = SplitPrompts if options.worker == "split" else ESTrainer
    return kind(model or smollm2(), task.reward_funcs, args, task.train_dataset, processing_class=tokenizer)


def draw_lengths(run: ESTrainer, longest: int) -> None:
    """Let completions of each member have a length of its own."""
    perturb = run.optimizer.perturb

    def drawing(member: Member) -> None:
        perturb(member)
        length = random.Random(member.seed).randint(8, longest)
        run.engine.generation_config.max_new_tokens = run.engine.generation_config.min_new_tokens = length

    run.optimizer.perturb = drawing


def measure_time(options: argparse.Namespace, folder: str) -> dict:
    run = trainer(options, folder, max_steps=options.steps, max_completion_length=options.longest)
    if options.worker == "static":
        run.processes.queue = lambda size: StaticShare(size, run.processes.rank, run.processes.count)
    draw_lengths(run, options.longest)
    times = StepTimes(idle_seconds=10 if options.worker == "traffic" else 0)
    run.add_callback(times)
    run.train()
    updates = [log["update_seconds"] for log in run.state.log_history if "update_seconds" in log]
    return {"seconds": times.seconds, "sent": times.sent, "updates": updates}


def measure_memory(options: argparse.Namespace, folder: str) -> dict:
    config = {"max_steps": 1, "max_completion_length": 8, "ds3_gather_for_generation": False}
    # With a tiny model first, so that libraries and compiled kernels do not count
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_key_value_heads": 3}
    tiny = AutoConfig.from_pretrained(smollm2(), **size, num_attention_heads=3, vocab_size=49152, head_dim=16)
    trainer(options, folder, AutoModelForCausalLM.from_config(tiny), **config).train()
    with Peak() as peak:
        run = trainer(options, folder, **config)
        loading, peak.highest = peak.mib, peak.now()
        run.train()
    held = sum(shard.working.nbytes + shard.master.nbytes for shard in run.optimizer.weights.shards) / MIB
    return {"peaks": run.processes.exchange(lambda: (held, loading, peak.mib))}


def launch(worker: str, options: argparse.Namespace, processes: int = 2) -> dict:
    """Run this file in processes of its own; returns what process 0 measured."""
    command = [sys.executable]
    with tempfile.TemporaryDirectory() as folder:
        if processes > 1:
            recipe = "cpu_two_processes.yaml" if worker in ("two", "static", "traffic") else "zero3.yaml"
            config = yaml.safe_load((RECIPES / recipe).read_text()) | {"use_cpu": True, "num_processes": processes}
            (Path(folder) / recipe).write_text(yaml.safe_dump(config))
            command += ["-m", "accelerate.commands.launch", "--config_file", f"{folder}/{recipe}"]
        given = [
            f"--{name}={value}" for name, value in vars(options).items() if name not in ("worker", "parts", "ways")
        ]
        command += [__file__, f"--worker={worker}", *given]
        result = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = (line for line in result.stdout.splitlines() if line.startswith(RESULT))
    return json.loads(line.removeprefix(RESULT))


def compare_times(options: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {way: [] for way in options.ways}
    updates: dict[str, list[float]] = {way: [] for way in options.ways}
    for number in range(options.rounds):
        for way in options.ways:
            options.seed = number  # other lengths in each round
            measured = launch(way, options, processes=1 if way == "one" else 2)
            seconds[way] += measured["seconds"]
            updates[way] += measured["updates"]
            print(f"round {number + 1}, {WAYS[way]}: {seconds[way][-1]:.1f} s a step", flush=True)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    first = options.ways[0]
    for way, median in medians.items():
        print(
            f"{WAYS[way]}: {median:.1f} s a step, {medians[first] / median:.2f} times as fast as {WAYS[first]}; "
            f"the update takes {statistics.median(updates[way]):.2f} s of it"
        )


def compare_memory(options: argparse.Namespace) -> None:
    options = argparse.Namespace(**{**vars(options), "population": 2})
    model = AutoModelForCausalLM.from_pretrained(smollm2())
    count = sum(parameter.numel() for parameter in model.parameters())
    total = count * (4 + (2 if options.dtype == "bfloat16" else 4)) / MIB
    peaks = launch("memory", options)["peaks"]
    print(f"weights and master, {options.dtype}: {total:.0f} MiB")
    for rank, (held, loading, peak) in enumerate(peaks):
        print(
            f"process {rank} of 2, lockstep: holds {held:.0f} MiB of them, peak of a step {peak:.0f} MiB "
            f"({peak / total:.0%}), peak while loading {loading:.0f} MiB"
        )


def compare_traffic(options: argparse.Namespace) -> None:
    options = argparse.Namespace(**{**vars(options), "steps": 5, "longest": 16})
    sent = launch("traffic", options)["sent"]
    kilobytes = statistics.median(sent) / 1000
    print(f"sent in a step, with all of TCP: {kilobytes:.1f} kB by both processes, {kilobytes / 2:.1f} kB by each")


PARTS = {"time": compare_times, "memory": compare_memory, "traffic": compare_traffic}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--population", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--longest", type=int, default=64, help="tokens of the longest completion")
    parser.add_argument("--steps", type=int, default=1, help="steps timed in each launch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is None:
        for part in options.parts:
            PARTS[part](options)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = (measure_memory if options.worker == "memory" else measure_time)(options, folder)
    if int(os.environ.get("RANK", 0)) == 0:
        print(RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
