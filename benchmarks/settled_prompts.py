"""
Prompts that tell no members apart: `python benchmarks/settled_prompts.py`, some minutes.

Half of the training prompts give every member the same reward. Runs with and without `skip_settled_prompts` go on
until held-out prompts like the other half reach a reward. Printed is how many completions that took, for each seed,
and the median of the ratios. The model is tiny, with random weights: it learns to write tokens with even numbers.
"""

import argparse
import logging
import statistics
import tempfile

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

from es_trainer import ESConfig, ESTrainer
from es_trainer.smollm2 import smollm2


def even_tokens(completion_ids, is_settled, **kwargs) -> list[float]:
    return [
        1.0 if settled else sum(token % 2 == 0 for token in ids) / max(len(ids), 1)
        for ids, settled in zip(completion_ids, is_settled, strict=True)
    ]


def rows(first: int, count: int, settled: bool) -> list[dict]:
    return [{"prompt": f"Number {number}", "is_settled": settled} for number in range(first, first + count)]


class StopAt(TrainerCallback):
    """Ends the run when a held-out reward is reached."""

    def __init__(self, reward: float):
        self.reward = reward
        self.last = 0.0

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.last = metrics["eval_reward"]
        control.should_training_stop = self.last >= self.reward


def completions_needed(tokenizer, options: argparse.Namespace, seed: int, skip: float) -> int:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    args = ESConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        seed=seed,
        max_steps=options.steps,
        population_size=options.population,
        num_prompts_per_step=options.prompts,
        skip_settled_prompts=skip,
        perturbation="low_rank",
        evaluate_center=False,
        sigma=0.01,
        learning_rate="sigma",
        max_completion_length=8,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="no",
        report_to="none",
        log_format="dict",
        disable_tqdm=True,
    )
    # Few, so that training sees them many times: the first time, nothing is known of a prompt
    train = Dataset.from_list(rows(0, 16, settled=True) + rows(16, 16, settled=False))
    held_out = Dataset.from_list(rows(32, 32, settled=False))
    stop = StopAt(options.reward)
    trainer = ESTrainer(LlamaForCausalLM(config), even_tokens, args, train, held_out, tokenizer, callbacks=[stop])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if stop.last < options.reward:
        raise RuntimeError(
            f"Seed {seed}: the held-out reward is {stop.last:.3f} after {options.steps} steps. Allow more."
        )
    return trainer.state.global_step * options.population * options.prompts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="most steps of a run")
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--reward", type=float, default=0.95, help="held-out reward at which a run ends")
    parser.add_argument("--skip", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    logging.getLogger("es_trainer").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    ratios = []
    for seed in options.seeds:
        plain, skipping = (completions_needed(tokenizer, options, seed, skip) for skip in (0.0, options.skip))
        ratios.append(plain / skipping)
        print(
            f"seed {seed}: {plain} completions, {skipping} with skip_settled_prompts: {ratios[-1]:.2f} times fewer",
            flush=True,
        )
    print(f"median: {statistics.median(ratios):.2f} times fewer")
