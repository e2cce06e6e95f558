"""
The population in one batch, against plain batches of as many rows: `python benchmarks/population.py`.

- speed: tokens/s of 30 low-rank members, and of a plain (unperturbed) batch of as many sequences; FLOP/s of the
  members' matrix products in the time of everything, and of one large product;
- lengths: completions of 8 to 128 tokens, with finished rows leaving the batch and with finished rows running on, and
  a plain batch of the same lengths in Transformers' continuous batching;
- memory: what a population batch takes at most, and what the plain batch takes (each in a process of its own).
"""

import argparse
import random
import statistics
import subprocess
import sys

import torch
from iteration import SIGMA, LowRank, seconds
from memory import MIB, Peak
from torch.utils.flop_counter import FlopCounterMode
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteria

from es_trainer.engines import Rows
from es_trainer.rollout import Completion


SHORTEST, LONGEST = 8, 128
LARGE = 2048  # rows and columns of the matrices that a processor multiplies at its best
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Subject(LowRank):
    """A model, and the prompts that its members and plain batches complete."""

    def members(self) -> list[Completion]:
        """Completions of all members in one batch."""
        with self.batch.install(self.optimizer.ask().members, SIGMA) as rows:
            return self.engine.generate(self.prompt_ids, seed=0, members=rows)

    def plain(self) -> list[Completion]:
        """As many completions of the unperturbed model, for texts that differ: equal ones would be computed once."""
        prompts = [[*ids[:-1], 1000 + copy] for copy in range(self.population) for ids in self.prompt_ids]
        return self.engine.generate(prompts, seed=0)


class Lengths(StoppingCriteria):
    """Ends the completion of each member for each prompt at a length drawn for it."""

    def __init__(self, subject: Subject, rows: Rows):
        draw = random.Random(0)
        # Prompts are told apart by their last token
        subject.prompt_ids = [[*ids, 1000 + i] for i, ids in enumerate(subject.prompt_ids)]
        self.width = max(map(len, subject.prompt_ids))
        self.rows = rows
        self.lengths = torch.tensor(
            [[draw.randint(SHORTEST, LONGEST) for _ in subject.prompt_ids] for _ in range(subject.population)]
        )

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        lengths = self.lengths[self.rows.members, input_ids[:, self.width - 1] - 1000]
        return input_ids.shape[1] - self.width >= lengths


def speed(dtype: torch.dtype, options: argparse.Namespace) -> None:
    matrices = torch.randn(2, LARGE, LARGE, dtype=dtype)

    def product() -> torch.Tensor:
        return matrices[0] @ matrices[1]

    for prompts in options.prompts:
        subject = Subject(dtype, options.population, prompts, options.tokens)
        subject.plain(), product()
        with FlopCounterMode(display=False) as counter:
            subject.members()
        rounds = [(seconds(subject.members), seconds(subject.plain), seconds(product)) for _ in range(options.rounds)]
        members, plain, large = (statistics.median(side) for side in zip(*rounds, strict=True))
        tokens = options.population * prompts * options.tokens
        flops, most = counter.get_total_flops(), 2 * LARGE**3
        print(
            f"speed, {dtype}, {prompts} prompts: {tokens / members:.0f} tokens/s; plain batch {tokens / plain:.0f}; "
            f"{statistics.median(b / a for a, b, _ in rounds):.0%} of it",
            f"    {flops / members / 1e9:.0f} GFLOP/s; a large product {most / large / 1e9:.0f}; "
            f"{statistics.median(flops / a / (most / c) for a, _, c in rounds):.0%} of it",
            sep="\n",
            flush=True,
        )


def lengths(dtype: torch.dtype, options: argparse.Namespace) -> None:
    prompts = max(options.prompts)
    subject = Subject(dtype, options.population, prompts, LONGEST)
    subject.engine.generation_config.min_new_tokens = 0
    subject.engine.generation_config.suppress_tokens = subject.engine.eos_token_ids
    subject.engine.generation_config.eos_token_id = None
    with subject.batch.install(subject.optimizer.ask().members, SIGMA) as rows:
        criterion = Lengths(subject, rows)
        subject.engine.stopping_criteria = [criterion]

        def members(drops_finished_rows: bool) -> float:
            subject.engine.drops_finished_rows = drops_finished_rows
            return seconds(lambda: subject.engine.generate(subject.prompt_ids, seed=0, members=rows))

        members(True)
        pairs = [(members(True), members(False)) for _ in range(options.rounds)]
    leaving, running = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(
        f"lengths, {dtype}, {prompts} prompts: finished rows leave {leaving:.1f} s; run on {running:.1f} s; "
        f"{statistics.median(b / a for a, b in pairs):.2f} times faster",
        flush=True,
    )
    # Continuous batching packs rows into one sequence, where members can't be told apart: both without noise, once
    plain = members(True)
    continuous = seconds(lambda: continuous_batching(subject, criterion))
    print(f"lengths, {dtype}, plain batch: {plain:.1f} s; continuous batching {continuous:.1f} s", flush=True)


def continuous_batching(subject: Subject, criterion: Lengths) -> None:
    config = GenerationConfig(do_sample=False, max_new_tokens=LONGEST, eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(page_size=32, num_blocks=1536, max_batch_tokens=2048)
    with subject.model.continuous_batching_context_manager(config, continuous_batching_config=settings) as manager:
        for member in range(subject.population):
            for prompt, ids in enumerate(subject.prompt_ids):
                manager.add_request(ids, max_new_tokens=int(criterion.lengths[member, prompt]))
        for _ in range(subject.population * len(subject.prompt_ids)):
            manager.get_result()


def memory(name: str, options: argparse.Namespace) -> None:
    for prompts in options.prompts:
        peaks = {}
        for kind in ("plain", "members"):
            command = [sys.executable, __file__, "--peak", kind, "--dtypes", name, "--prompts", str(prompts)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            peaks[kind], factors = map(float, output.splitlines()[-1].split())
        print(
            f"memory, {name}, {prompts} prompts: {peaks['members']:.0f} MiB; plain batch {peaks['plain']:.0f} MiB, "
            f"factors {factors:.0f} MiB",
            flush=True,
        )


def peak(kind: str, dtype: torch.dtype, options: argparse.Namespace) -> None:
    subject = Subject(dtype, options.population, options.prompts[0], options.tokens)
    for parameter in subject.model.parameters():
        parameter.data.copy_(parameter.data.clone())  # from the mapped file into memory
    with Peak() as peak:
        {"plain": subject.plain, "members": subject.members}[kind]()
    print(peak.mib, subject.population * subject.optimizer.weights.member_bytes() / MIB)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population", type=int, default=30)
    parser.add_argument("--prompts", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--what", nargs="+", choices=["speed", "lengths", "memory"], default=["speed", "lengths", "memory"]
    )
    parser.add_argument("--peak", choices=["plain", "members"], help="measure the peak of one in this process")
    options = parser.parse_args()
    if options.peak:
        peak(options.peak, DTYPES[options.dtypes[0]], options)
    else:
        print(f"N={options.population}, {options.tokens} tokens, SmolLM2-135M")
        for name in options.dtypes:
            for what in options.what:
                memory(name, options) if what == "memory" else globals()[what](DTYPES[name], options)
