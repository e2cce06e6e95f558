"""
Populations that are used for several steps: `python benchmarks/reuse.py`, some minutes.

Runs with `num_steps_per_population` of 1, 2 and 4 do the same number of steps, each with some learning rates. Printed
are medians over the seeds: the reward of held-out prompts at the end, `signal` and `update_cosine` over the steps, and
the seconds of a step in which noise is made. The model is tiny, with random weights: it learns to write even tokens
after even numbers, and odd ones after odd numbers.
"""

import argparse
import logging
import statistics
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from es_trainer import ESConfig, ESTrainer


KEYS = ("signal", "update_cosine", "noise_seconds", "update_seconds")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["</s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def same_parity(completion_ids, number, **kwargs) -> list[float]:
    return [
        sum(token % 2 == wanted % 2 for token in ids) / max(len(ids), 1)
        for ids, wanted in zip(completion_ids, number, strict=True)
    ]


def prompts(first: int, count: int) -> Dataset:
    numbers = range(first, first + count)
    return Dataset.from_list([{"prompt": f"Number {number}", "number": number} for number in numbers])


def run(tokenizer, options: argparse.Namespace, seed: int, reuse: int, learning_rate: float) -> dict[str, float]:
    """The held-out reward at the end of a run, and medians of the metrics of its steps."""
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
        num_steps_per_population=reuse,
        population_size=options.population,
        num_prompts_per_step=options.prompts,
        perturbation=options.perturbation,
        evaluate_center=False,
        sigma=0.01,
        learning_rate=f"{learning_rate}*sigma",
        max_completion_length=8,
        save_strategy="no",
        report_to="none",
        log_format="dict",
        disable_tqdm=True,
    )
    model = LlamaForCausalLM(config)
    trainer = ESTrainer(model, same_parity, args, prompts(0, 256), prompts(256, 64), tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    found = {"held_out": trainer.evaluate()["eval_reward"]}
    for key in KEYS:
        values = [log[key] for log in trainer.state.log_history if log.get(key) is not None]
        if values:
            found[key] = statistics.median(values)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--perturbation", default="low_rank")
    parser.add_argument("--reuse", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="times sigma")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    logging.getLogger("es_trainer").setLevel(logging.ERROR)
    tokenizer = byte_tokenizer()
    for reuse in options.reuse:
        for learning_rate in options.learning_rates:
            runs = [run(tokenizer, options, seed, reuse, learning_rate) for seed in options.seeds]
            medians = {key: statistics.median(found[key] for found in runs) for key in runs[0]}
            print(
                f"num_steps_per_population={reuse} learning_rate={learning_rate}*sigma: "
                + ", ".join(f"{key} {value:.3g}" for key, value in medians.items())
                + f"; held_out of the seeds: {sorted(round(found['held_out'], 3) for found in runs)}",
                flush=True,
            )
