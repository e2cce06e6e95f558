"""
Which tasks could move SmolLM2? `python -m benchmarks.learning.candidates` prints the share of right answers.

A task is fit for a study if samples are right now and then, so that there is something to learn from, and greedy
answers are not right already. A short answer counts if the right one is a word of it; of tasks of reasoning-gym, its
verifier decides.
"""

import random
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from es_trainer import ESConfig
from es_trainer.engines import TransformersEngine
from es_trainer.smollm2 import smollm2
from es_trainer.tasks import reasoning_gym

from .questions import SAMPLES, passes
from .tasks import WORDS


QUESTIONS = 48
WORD = "Answer with one word."
NUMBER = "Answer with the number only."
GENERATORS = ("basic_arithmetic", "chain_sum", "letter_counting", "leg_counting")  # of reasoning-gym's easiest


def comparing(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(10, 1000), 2)
    return f"Which number is larger, {numbers[0]} or {numbers[1]}? {NUMBER}", str(max(numbers))


def adding(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 20), rng.randint(2, 20)
    return f"What is {a} + {b}? {NUMBER}", str(a + b)


def copying(rng: random.Random) -> tuple[str, str]:
    words = rng.sample([word for listed in WORDS.values() for word in listed.split()], 4)
    return f"Repeat the last word of this list: {', '.join(words)}. {WORD}", words[-1]


def odd_one_out(rng: random.Random) -> tuple[str, str]:
    kind, other = rng.sample(sorted(WORDS), 2)
    odd = rng.choice(WORDS[other].split())
    words = [*rng.sample(WORDS[kind].split(), 3), odd]
    rng.shuffle(words)
    return f"Which word does not belong: {', '.join(words)}? {WORD}", odd


def choosing(rng: random.Random) -> tuple[str, str]:
    kind = rng.choice(sorted(WORDS))
    return f"Is {rng.choice(WORDS[kind].split())} an animal, a fruit, a tool or a country? {WORD}", kind


@dataclass(frozen=True)
class Candidate:
    """Prompts, most tokens of a completion, and which texts are right."""

    prompts: list[list[dict[str, str]]]
    tokens: int
    right: Callable[[list[str]], list[bool]]


def short_answers(make: Callable[[random.Random], tuple[str, str]]) -> Candidate:
    rng = random.Random(0)
    rows = [make(rng) for _ in range(QUESTIONS)]

    def right(texts: list[str]) -> list[bool]:
        return [
            answer.lower() in re.findall(r"\w+", text.lower()) for text, (_, answer) in zip(texts, rows, strict=True)
        ]

    return Candidate([[{"role": "user", "content": question}] for question, _ in rows], 8, right)


def verified(generator: str) -> Candidate:
    """Questions of reasoning-gym; its verifier decides."""
    task = reasoning_gym(generator, train_size=1, eval_size=QUESTIONS)
    rows, (reward,) = task.eval_dataset, task.reward_funcs

    def right(texts: list[str]) -> list[bool]:
        return [score == 1.0 for score in reward(texts, entry=list(rows["entry"]))]

    return Candidate(list(rows["prompt"]), 48, right)


def shares(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, candidate: Candidate) -> list[float]:
    """Of right answers: greedy ones, single samples, and prompts with a right one in 8 samples."""
    drawn = []
    for temperature, seed in [(0.0, 0), *((1.0, seed) for seed in range(SAMPLES))]:
        args = ESConfig(
            "unused", use_cpu=True, max_completion_length=candidate.tokens, temperature=temperature, report_to="none"
        )
        engine = TransformersEngine(model, tokenizer, args)
        completions = engine.generate(engine.tokenize(candidate.prompts), seed=seed)
        drawn.append(candidate.right([completion.text for completion in completions]))
    of_samples = passes(drawn[1:])
    return [statistics.fmean(drawn[0]), of_samples["pass@1"], of_samples[f"pass@{SAMPLES}"]]


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    candidates = {make.__name__: short_answers(make) for make in (choosing, comparing, adding, copying, odd_one_out)}
    candidates |= {
        name: verified(name) for name in ("basic_arithmetic", "chain_sum", "letter_counting", "leg_counting")
    }
    print("| task | greedy | one sample | one of 8 samples |\n| --- | --- | --- | --- |")
    for name, candidate in candidates.items():
        found = shares(model, tokenizer, candidate)
        print(f"| {name} | " + " | ".join(f"{share:.2f}" for share in found) + " |", flush=True)
