"""
What a GPU does, against what it can do: `python benchmarks/gpu.py`.

Models have the shapes of Qwen2.5 and random weights, in bfloat16 with float32 masters. Every figure is the median of
several rounds after one that does not count, timed by the host around a synchronisation. Parts that are done are kept
in `--results`; after an interruption, the same command goes on with the next one. At the end, the figures are written
into `--report`, with the card and the versions. Without a GPU it runs on the CPU, where `--sizes tiny` takes seconds.
"""

import argparse
import gc
import itertools
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from es_trainer import ESConfig, ESTrainer
from es_trainer.engines import PopulationBatch, TransformersEngine, population_batch
from es_trainer.evolution import EvolutionStrategy, Member
from es_trainer.noise import noise
from es_trainer.noise import shapes as perturbation


QWEN = {"vocab_size": 151936, "max_position_embeddings": 4096, "tie_word_embeddings": True, "eos_token_id": 2}
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 512},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}
PROMPT = 64  # tokens of a prompt
SIGMA, LEARNING_RATE = 1e-3, 5e-4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GIB = 2**30

Figures = dict[str, str]  # what was measured, and the figure


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(function: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def peak_memory() -> Figures:
    return {"peak memory": f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB"} if DEVICE.type == "cuda" else {}


# ---- models and prompts ----


def make_model(size: str, dtype: torch.dtype) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        torch.set_default_dtype(dtype)
        model = Qwen2ForCausalLM(Qwen2Config(**{**QWEN, **SHAPES[size]})).eval()
        torch.set_default_dtype(torch.float32)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def make_prompts(count: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, (PROMPT,), generator=draw).tolist() for _ in range(count)]


# ---- parts ----


def kernels(options: argparse.Namespace) -> Figures:
    """The noise kernel against the device's copies and torch's own normals."""
    weights, rounds = options.weights, options.rounds
    out, other = (torch.zeros(weights, device=DEVICE) for _ in range(2))
    copy = median_seconds(lambda: out.copy_(other), rounds)
    randn = median_seconds(lambda: torch.randn(weights, out=out), rounds)
    fill = median_seconds(lambda: noise.fill(out, "weight", 1), rounds)
    figures = {
        "`Tensor.copy_`, read and written": f"{8 * weights / copy / 1e9:.0f} GB/s",
        "`torch.randn`": f"{weights / randn / 1e9:.1f} G weights/s",
        "`noise.fill`": f"{weights / fill / 1e9:.1f} G weights/s",
    }
    half = out.bfloat16()
    for target, rounding in ((out, None), (half, None), (half, 1)):
        took = median_seconds(lambda t=target, r=rounding: noise.add(other, t, "w", [1], [1e-3], rounding=r), rounds)
        moved, of_copy = (4 * weights + target.nbytes) / took, 8 * weights / copy
        dtype = str(target.dtype).removeprefix("torch.")
        figures[f"`noise.add`, float32 to {dtype}{', stochastic rounding' * (rounding is not None)}"] = (
            f"{weights / took / 1e9:.1f} G weights/s, {moved / 1e9:.0f} GB/s, {moved / of_copy:.0%} of the copy's"
        )
    seeds = list(range(1, 31))
    took = median_seconds(lambda: noise.add(out, out, "w", seeds, [1e-3] * 30), rounds)
    return figures | {"`noise.add` of 30 members": f"{30 * weights / took / 1e9:.1f} G weights/s"}


def update(strategy: EvolutionStrategy) -> None:
    strategy.tell(strategy.ask(), torch.linspace(-1, 1, strategy.population_size).tolist())
    strategy.step()


def strategy(options: argparse.Namespace, size: str, master_weights: str) -> Figures:
    """A member's perturbation and an update."""
    model = make_model(size, torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    figures = {}
    for name, kind in (("Gaussian", perturbation.Gaussian()), ("low-rank", perturbation.LowRank())):
        es = EvolutionStrategy(
            list(model.named_parameters()), lr=LEARNING_RATE, master_weights=master_weights, perturbation=kind
        )
        took = median_seconds(lambda es=es: es.perturb(Member(1)), options.rounds)
        es.restore()
        # Masters are read and working weights written
        figures[f"{name} member"] = f"{took * 1e3:.1f} ms, {6 * count / took / 1e9:.0f} GB/s"
        took = median_seconds(lambda es=es: update(es), options.rounds)
        figures[f"update of {es.population_size} {name} members"] = f"{took * 1e3:.0f} ms"
        del es  # before the next one's masters are made
    return figures | peak_memory()


def population(options: argparse.Namespace, size: str, members: int) -> Figures:
    """A population in one batch, a plain batch of as many rows, and members one at a time."""
    model = make_model(size, torch.bfloat16)
    strategy = EvolutionStrategy(
        list(model.named_parameters()),
        lr=LEARNING_RATE,
        sigma=SIGMA,
        population_size=members,
        perturbation=perturbation.LowRank(),
    )
    batch = PopulationBatch(model, strategy.weights)
    tokens, prompts = options.tokens, make_prompts(options.prompts)
    args = ESConfig("bench", use_cpu=True, max_completion_length=tokens, generation_kwargs={"min_new_tokens": tokens})
    engine = TransformersEngine(model, make_tokenizer(), args)

    def together() -> None:
        with batch.install(strategy.ask().members, SIGMA) as rows:
            engine.generate(prompts, seed=0, members=rows)

    def without_kernels() -> None:
        with mock.patch.object(population_batch, "_has_kernels", lambda device: False):
            together()

    def alone() -> None:
        strategy.perturb(strategy.ask().members[0])
        engine.generate(prompts, seed=0)
        strategy.restore()

    made = members * len(prompts) * tokens
    took = median_seconds(together, options.rounds)
    operations = median_seconds(without_kernels, options.rounds)
    plain = median_seconds(lambda: engine.generate(prompts * members, seed=0), options.rounds)
    one = median_seconds(alone, options.rounds) * members
    return {
        "low-rank members in one batch": f"{made / took:.0f} tokens/s, {took / tokens * 1e3:.0f} ms a token",
        "the same without kernels": f"{made / operations:.0f} tokens/s, in {operations / took:.1f} times the time",
        "a plain batch of as many rows": f"{made / plain:.0f} tokens/s; the members have {plain / took:.0%} of it",
        "one member at a time": f"{made / one:.0f} tokens/s; the batch has {one / took:.1f} times that",
        **peak_memory(),
    }


class StepSeconds(TrainerCallback):
    """Times steps."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def training_step(options: argparse.Namespace, size: str, kind: str) -> Figures:
    """A whole step of a trainer: as many completions of as many prompts, all weights trained."""
    members, prompts, timer, rewards = options.populations[0], options.prompts, StepSeconds(), itertools.count()
    tokenizer = make_tokenizer()
    dataset = Dataset.from_dict({"prompt": [tokenizer.decode(ids) for ids in make_prompts(prompts)]})

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        # Whatever the completions are, members differ, so that there is an update
        return [float(next(rewards) ** 2 % 97) for _ in completions]

    with tempfile.TemporaryDirectory() as folder:
        shared = {"output_dir": folder, "use_cpu": DEVICE.type == "cpu", "bf16": True, "max_steps": options.rounds + 1}
        shared |= {"max_completion_length": options.tokens, "generation_kwargs": {"min_new_tokens": options.tokens}}
        shared |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
        if kind == "GRPOTrainer":
            batches = {"per_device_train_batch_size": members, "gradient_accumulation_steps": prompts}
            args = GRPOConfig(**shared, **batches, num_generations=members)
            trainer = GRPOTrainer(make_model(size, torch.float32), reward, args, dataset, processing_class=tokenizer)
        else:
            args = ESConfig(**shared, perturbation=kind, population_size=members, num_prompts_per_step=prompts)
            trainer = ESTrainer(make_model(size, torch.float32), reward, args, dataset, processing_class=tokenizer)
        trainer.add_callback(timer)
        trainer.train()
    took = statistics.median(timer.seconds[1:])
    made = members * prompts
    return {"a step": f"{took:.2f} s, {made / took:.1f} completions/s", **peak_memory()}


def vllm(options: argparse.Namespace, size: str) -> Figures:
    """Tokens/s of vLLM for a plain batch of as many rows as the population's."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer().save_pretrained(folder)
        Qwen2Config(**{**QWEN, **SHAPES[size]}, architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
        llm = LLM(folder, load_format="dummy", dtype="bfloat16", max_model_len=PROMPT + options.tokens)
    params = SamplingParams(temperature=0.0, max_tokens=options.tokens, min_tokens=options.tokens, detokenize=False)
    rows = [{"prompt_token_ids": ids} for ids in make_prompts(options.prompts)] * options.populations[0]
    took = median_seconds(lambda: llm.generate(rows, params, use_tqdm=False), options.rounds)
    return {"a plain batch": f"{len(rows) * options.tokens / took:.0f} tokens/s"}


def parts(options: argparse.Namespace) -> dict[str, Callable[[], Figures]]:
    """All parts by name, the cheap ones first."""
    rows = f"{options.prompts} prompts of {PROMPT} tokens, {options.tokens} new tokens"
    found: dict[str, Callable[[], Figures]] = {"kernels": lambda: kernels(options)}
    for size in options.sizes:
        for place in ("device", "host"):
            found[f"{size}, masters on the {place}"] = lambda s=size, p=place: strategy(options, s, p)
        for members in options.populations:
            found[f"{size}, {members} members x {rows}"] = lambda s=size, m=members: population(options, s, m)
    size, members = options.sizes[0], options.populations[0]
    for kind in ("low_rank", "gaussian", "GRPOTrainer"):
        name = kind if kind == "GRPOTrainer" else f"ESTrainer, {kind}"
        found[f"{size}, {name}, {members} completions of {rows}"] = lambda k=kind: training_step(options, size, k)
    if _version("vllm") is not None:
        found[f"{size}, vLLM, {members} rows of {rows}"] = lambda: vllm(options, size)
    return found


# ---- results ----


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> str:
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    packages = {"PyTorch": torch.__version__, "CUDA": torch.version.cuda, "Triton": triton.__version__}
    packages |= {name: _version(name.lower()) for name in ("Transformers", "TRL", "vLLM")}
    return ", ".join([card, *(f"{name} {number}" for name, number in packages.items() if number is not None)])


class Results:
    """
    Figures of parts, a line of a file each, written as soon as they are known.

    Args:
        path (`Path`):
            The file.
        where (`str`):
            The machine, and all options: what was measured with others does not count.
    """

    def __init__(self, path: Path, where: str):
        self.path, self.where = path, where
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
        self.figures: dict[str, Figures] = {
            line["part"]: line["figures"] for line in found if line["where"] == self.where
        }

    def measure(self, part: str, function: Callable[[], Figures]) -> None:
        """Do a part, unless it is done."""
        if part in self.figures:
            print(f"{part}: done before")
            return
        start = time.perf_counter()
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.figures[part] = function()
        with self.path.open("a") as file:
            print(json.dumps({"where": self.where, "part": part, "figures": self.figures[part]}), file=file)
        print(f"{part} ({time.perf_counter() - start:.0f} s)")
        for what, figure in self.figures[part].items():
            print(f"  {what}: {figure}")

    def table(self) -> str:
        """All figures in Markdown."""
        rows = [
            f"| {part} | {what} | {figure} |" for part, own in self.figures.items() for what, figure in own.items()
        ]
        return "\n".join(["| | what | figure |", "| --- | --- | --- |", *rows])


def write_section(path: Path, title: str, text: str) -> None:
    """Write a section of a Markdown file, in the place of the one with the same title if there is one."""
    section = f"# {title}\n\n{text}\n"
    document = path.read_text() if path.exists() else ""
    before = re.compile(rf"^# {re.escape(title)}\n.*?(?=^# |\Z)", re.DOTALL | re.MULTILINE)
    if before.search(document):
        document = before.sub(lambda _: section + "\n", document).rstrip("\n") + "\n"
    else:
        document = f"{document.rstrip()}\n\n{section}".lstrip("\n")
    path.write_text(document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["0.5B", "7B"])
    parser.add_argument("--weights", type=int, default=1 << 28, help="of the kernels' figures")
    parser.add_argument("--populations", type=int, nargs="+", default=[30, 256])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--report", type=Path, default=Path(__file__).with_name("RESULTS.md"))
    options = parser.parse_args()
    measured = {name: value for name, value in vars(options).items() if name not in ("results", "report")}
    results = Results(options.results, f"{machine()}, {measured}")
    print(machine())
    for part, function in parts(options).items():
        results.measure(part, function)
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    card, *versions = machine().split(", ")
    text = f"`make gpu`, medians of {options.rounds} rounds. {', '.join(versions)}.\n\n{results.table()}"
    write_section(options.report, f"Figures of {card}", text)


if __name__ == "__main__":
    main()
