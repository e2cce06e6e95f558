"""
The metric that is reported, as the reward: `python benchmarks/macro_f1.py`, half an hour on two cores.

SmolLM2 sorts messages of customers into four kinds, of which one is much more frequent than the others. One run has
the share of right answers as its reward, a number for each completion; the other has macro-F1, one number for all
completions of a member. All else is the same. Both metrics are those of held-out messages.
"""

import argparse
import random
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset

from es_trainer import ESConfig, ESTrainer
from es_trainer.report.curves import plot_metric
from es_trainer.report.runs import Run
from es_trainer.rewards import completion_text, per_member
from es_trainer.smollm2 import smollm2


KINDS = ("delivery", "refund", "password", "praise")
SHARES = (0.76, 0.08, 0.08, 0.08)
THINGS = ("lamp", "book", "chair", "phone", "jacket", "bicycle", "kettle", "guitar")
MESSAGES = {
    "delivery": (
        "Where is my {}?",
        "The {} that I ordered is late.",
        "When does the {} come?",
        "My {} is not here yet.",
    ),
    "refund": (
        "I want my money back for the {}.",
        "The {} is broken, pay me back.",
        "Please return the price of the {}.",
    ),
    "password": ("I cannot log in to see my {}.", "I forgot how to sign in since I bought the {}."),
    "praise": ("I love the {}, thank you!", "The {} is wonderful.", "Great {}, well done!"),
}
HELD_OUT = 1 << 20  # seeds from here on


def messages(count: int, first: int) -> Dataset:
    rows = []
    for seed in range(first, first + count):
        rng = random.Random(seed)
        (kind,) = rng.choices(KINDS, SHARES)
        text = rng.choice(MESSAGES[kind]).format(rng.choice(THINGS))
        question = f'"{text}" Is this about delivery, refund, password or praise? Answer with one word.'
        rows.append({"prompt": [{"role": "user", "content": question}], "kind": kind})
    return Dataset.from_list(rows)


def first_named(completion, kinds: Iterable[str] = KINDS) -> str | None:
    """The first kind that the completion names."""
    text = completion_text(completion).lower()
    found = [(text.index(kind), kind) for kind in kinds if kind in text]
    return min(found)[1] if found else None


def accuracy(completions, kind, **kwargs) -> list[float]:
    return [float(first_named(completion) == right) for completion, right in zip(completions, kind, strict=True)]


@per_member
def macro_f1(completions, kind, **kwargs) -> float:
    """Mean of the F1 of the kinds that occur."""
    pairs = [(first_named(completion), right) for completion, right in zip(completions, kind, strict=True)]
    scores = []
    for each in set(kind):
        hits = sum(said == right == each for said, right in pairs)
        named = sum(said == each for said, _ in pairs)
        scores.append(2 * hits / (named + list(kind).count(each)))
    return statistics.mean(scores)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all runs on this task have in common."""
    return {
        "use_cpu": True,
        "max_steps": options.steps,
        "population_size": options.population,
        "num_prompts_per_step": options.prompts,
        "perturbation": "low_rank",
        "sigma": options.sigma,
        "learning_rate": "sigma",
        "max_completion_length": 8,
        "per_device_eval_batch_size": options.held_out,
        "save_strategy": "no",
        "report_to": "none",
    }


REWARDS = {"accuracy": [1.0, 0.0], "macro-F1": [0.0, 1.0]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--held_out", type=int, default=128)
    parser.add_argument("--sigma", type=float, default=0.005)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output_dir", default="macro-f1")
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        for name, reward_weights in REWARDS.items():
            folder = Path(options.output_dir) / f"{name}-{seed}"
            args = ESConfig(
                output_dir=str(folder),
                seed=seed,
                **settings(options),
                reward_weights=reward_weights,
                eval_strategy="steps",
                eval_steps=max(options.steps // 4, 1),
                eval_on_start=True,
            )
            data = messages(1024, seed << 10), messages(options.held_out, HELD_OUT)
            trainer = ESTrainer(smollm2(), [accuracy, macro_f1], args, *data)
            trainer.train()
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            runs.append(Run.read(folder, f"rewarded: {name}"))
            for log in trainer.state.log_history:
                if "eval_reward" in log:
                    found = ", ".join(
                        f"{key} {log[f'eval_rewards/{key}/mean']:.3f}" for key in ("accuracy", "macro_f1")
                    )
                    print(f"rewarded: {name}, seed {seed}, step {log['step']}: {found}", flush=True)
    plot_metric(runs, Path(options.output_dir) / "macro_f1.png", "eval_rewards/macro_f1/mean")
