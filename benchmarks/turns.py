"""
Conversations of several turns: `python benchmarks/turns.py`.

Members of a low-rank population write an answer, get the result of a tool, and go on. Turns per second of a population
batch whose turns continue from the keys and values of the turns before, of one that computes each conversation anew,
and of members one at a time, anew as well. All generate the same tokens.
"""

import argparse
import statistics

import torch
from iteration import SIGMA, LowRank, seconds
from tqdm.auto import tqdm

from es_trainer.engines.decoding import Row


class Conversations(LowRank):
    """A population that answers in turns."""

    def __init__(self, *args, turns: int, result: int):
        super().__init__(*args)
        self.turns, self.result = turns, result
        self.members = self.optimizer.ask().members

    def together(self, continued: bool) -> None:
        """All members in one batch."""
        with self.batch.install(self.members, SIGMA) as rows:
            self.converse(len(self.members), rows, continued)

    def one_at_a_time(self) -> None:
        """Members one after the other, in the model's weights, each conversation anew."""
        for member in self.members:
            self.optimizer.perturb(member)
            self.converse(1, None, continued=False)
        self.optimizer.restore()

    def converse(self, members: int, installed, continued: bool) -> None:
        """The turns of some members' conversations, one for each prompt."""
        rows = [Row(member, i, 0) for member in range(members) for i in range(len(self.prompt_ids))]
        texts = [self.prompt_ids[row.prompt] for row in rows]
        caches = {} if continued else None
        for turn in range(self.turns):
            made = self.engine.complete(texts, rows, 0, installed, caches=caches)
            result = list(range(1000 + turn, 1000 + turn + self.result))
            texts = [text + answer.ids + result for text, answer in zip(texts, made, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--result", type=int, default=48, help="tokens of a tool's result, with those around it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    size = (options.population, options.prompts, options.tokens)
    for turns in options.turns:
        subject = Conversations(getattr(torch, options.dtype), *size, turns=turns, result=options.result)
        ways = {
            "continued": lambda subject=subject: subject.together(True),
            "anew": lambda subject=subject: subject.together(False),
            "one member at a time": subject.one_at_a_time,
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in tqdm(range(options.rounds), desc=f"{turns} turns"):
            for way, run in ways.items():
                times[way].append(seconds(run))
        count = options.population * options.prompts * turns
        print(f"{turns} turns, N={options.population}, {options.prompts} prompts, {options.dtype}", flush=True)
        for way, measured in times.items():
            ratio = statistics.median(a / b for a, b in zip(measured, times["continued"], strict=True))
            speed = count / statistics.median(measured)
            print(f"  {way}: {speed:.2f} turns/s, {ratio:.2f} times as long as continued", flush=True)
