"""
vLLM against Transformers as the engine of a step: `python benchmarks/vllm_engine.py` where vLLM is installed.

One step of SmolLM2-135M-Instruct with 30 members, which complete 8 prompts with 64 tokens each: one member after
another with full noise, and all members together with low-rank noise, by either engine, and by one vLLM server on this
machine. Each step runs in a process of its own, engines take turns, and medians are printed: tokens/s, and the shares
of the step that noise and the update take.
"""

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator


sys.path.pop(0)  # this folder, where this file would be taken for vLLM

import torch

from es_trainer import ESConfig, ESTrainer
from es_trainer.evolution import EvolutionStrategy
from es_trainer.smollm2 import smollm2
from es_trainer.tasks import conciseness
from es_trainer.weights.store import Weights


ENGINES = {
    "Transformers, one at a time": {"population_batch_size": 1},
    "Transformers, population batch": {"perturbation": "low_rank"},
    "vLLM, one at a time": {"use_vllm": True},
    "vLLM, adapters": {"use_vllm": True, "perturbation": "low_rank", "vllm_lora": True},
}
SERVERS = {
    "vLLM server, one at a time": ENGINES["vLLM, one at a time"],
    "vLLM server, adapters": ENGINES["vLLM, adapters"],
}


def measure(engine: str, options: argparse.Namespace) -> dict[str, float]:
    """Run a step and say how long it took."""
    if engine in ENGINES:
        return run(ENGINES[engine], options)
    with server(SERVERS[engine], options) as url:
        return run({**SERVERS[engine], "vllm_mode": "server", "vllm_server_base_url": [url]}, options)


@contextlib.contextmanager
def server(settings: dict, options: argparse.Namespace) -> Iterator[str]:
    """Inside, there is a server at the URL that is yielded."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "es_trainer.cli", "vllm-serve", "--model", smollm2(), "--port", str(port)]
    command += ["--dtype", options.dtype, "--max-model-len", "512", "--gpu-memory-utilization", "0.3"]
    if "vllm_lora" in settings:
        command += ["--enable-lora", "--max-loras", str(options.population), "--max-lora-rank", "8"]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def run(settings: dict, options: argparse.Namespace) -> dict[str, float]:
    """Run a step with an engine."""
    shortest = "min_tokens" if "use_vllm" in settings else "min_new_tokens"
    task = conciseness()
    with tempfile.TemporaryDirectory() as folder:
        args = ESConfig(
            folder,
            use_cpu=not torch.cuda.is_available(),
            bf16=options.dtype == "bfloat16",
            population_size=options.population,
            num_prompts_per_step=options.prompts,
            max_completion_length=options.tokens,
            generation_kwargs={shortest: options.tokens},
            vllm_max_model_length=512,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trainer = ESTrainer(smollm2(), task.reward_funcs, args, task.train_dataset)
        prompts = list(task.train_dataset["prompt"])[: options.prompts]
        trainer.engine.generate(trainer.engine.tokenize(prompts), seed=0)  # warms up
        if "vllm_mode" not in settings:  # servers have the weights
            warm_up(trainer.optimizer.weights)
        trainer.train()
        (log,) = [log for log in trainer.state.log_history if "step_time" in log]
    tokens = options.population * options.prompts * options.tokens
    return {
        "tokens/s": tokens / log["step_time"],
        "noise": log["noise_seconds"] / log["step_time"],
        "update": log["update_seconds"] / log["step_time"],
    }


def warm_up(weights: Weights) -> None:
    """Get the weights from the mapped file into memory, and the kernels compiled by an update of a few others."""
    for shard in weights.shards:
        shard.trained.mul_(1.0)
    few = torch.nn.Parameter(torch.zeros(8, 8))
    dtype = weights.shards[0].working.dtype
    small = EvolutionStrategy([("few", few)], population_size=2, dtype=dtype, perturbation=weights.perturbation)
    population = small.ask()
    small.perturb(population.members[0])
    small.tell(population, [0.0, 1.0])
    small.step()


def compare(options: argparse.Namespace) -> None:
    """Let the engines take turns, and print medians."""
    found = {engine: [] for engine in options.engines}
    for _ in range(options.rounds):
        for engine in options.engines:
            command = [sys.executable, __file__, *sys.argv[1:], "--engines", engine, "--measure"]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[engine].append(json.loads(output.splitlines()[-1]))
    first = found[options.engines[0]]
    print(
        f"SmolLM2-135M-Instruct, {options.dtype}, N={options.population}, {options.prompts} prompts, "
        f"{options.tokens} tokens, {'CUDA' if torch.cuda.is_available() else 'CPU'}"
    )
    for engine, steps in found.items():
        speed, noise, update = (statistics.median(values) for values in zip(*map(dict.values, steps), strict=True))
        times = statistics.median(mine["tokens/s"] / base["tokens/s"] for mine, base in zip(steps, first, strict=True))
        print(
            f"{engine:31} {speed:6.0f} tokens/s ({times:.2f} times the first), noise {noise:.1%}, update {update:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES, *SERVERS], default=[*ENGINES, *SERVERS])
    parser.add_argument("--measure", action="store_true", help="measure one engine in this process")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.engines[0], options)))
    else:
        compare(options)
