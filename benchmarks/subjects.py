"""Models and tasks on which settings are tried: two with a tiny model that learns in seconds, and SmolLM2."""

import copy
import statistics
import string
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from es_trainer import ESConfig, ESTrainer
from es_trainer.smollm2 import smollm2
from es_trainer.tasks import conciseness


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


@cache
def _taught(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    characters = torch.tensor(byte_tokenizer().encode(string.ascii_letters + string.digits))
    prompts = torch.tensor(byte_tokenizer()([f"Number {number}" for number in range(10, 100)]).input_ids)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        number = torch.randint(len(prompts), (32,))
        order = [7 * number]  # it begins with the number's character, and goes on with the next one, half of the time
        for _ in range(8):
            other = torch.randint(len(characters), (32,))
            order.append(torch.where(torch.rand(32) < 0.5, order[-1] + 1, other) % len(characters))
        ids = torch.cat([prompts[number], characters[torch.stack(order[1:], dim=1)]], dim=1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def tiny_model(seed: int) -> LlamaForCausalLM:
    """Two layers that have learned to write letters and digits: there is something that noise can break."""
    return copy.deepcopy(_taught(seed))


def numbers(first: int, count: int) -> Dataset:
    return Dataset.from_list([{"prompt": f"Number {number}"} for number in range(first, first + count)])


def letters(completions, **kwargs) -> list[float]:
    """Share of lower-case letters."""
    return [sum(map(str.islower, text)) / max(len(text), 1) for text in completions]


def digits_last(completions, **kwargs) -> list[float]:
    """Share of characters that are letters in the first half, and digits in the second one."""
    return [
        (sum(map(str.isalpha, text[:4])) + sum(map(str.isdigit, text[4:]))) / max(len(text), 1) for text in completions
    ]


@dataclass(frozen=True)
class Subject:
    """
    A model and a task.

    Args:
        model (`Callable`):
            Makes the model from a seed, or names it.
        reward (`Callable`):
            The reward function.
        train (`Dataset`), held_out (`Dataset`):
            Prompts.
        sigma (`float`):
            One by which it learns.
        options (`dict`):
            Further settings of a run.
    """

    model: Callable[[int], str | LlamaForCausalLM]
    reward: Callable[..., list[float]]
    train: Dataset
    held_out: Dataset
    sigma: float
    options: dict[str, Any]

    def config(self, seed: int, output_dir: str, **options) -> ESConfig:
        common = {"output_dir": output_dir, "use_cpu": True, "perturbation": "low_rank", "evaluate_center": False}
        common |= {"max_completion_length": 8, "per_device_eval_batch_size": 64, "save_strategy": "no"}
        common |= {"report_to": "none", "log_format": "dict", "disable_tqdm": True}
        return ESConfig(**{**common, **self.options, "seed": seed, **options})

    def trainer(self, args: ESConfig, trainer_class: type[ESTrainer] = ESTrainer, reward=None) -> ESTrainer:
        model = self.model(args.seed)
        trainer = trainer_class(
            model,
            reward or self.reward,
            args,
            self.train,
            self.held_out,
            None if isinstance(model, str) else byte_tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def subject(name: str) -> Subject:
    """`"letters"`, `"digits"` or `"smollm2"`."""
    if name == "smollm2":
        task = conciseness()
        (reward,) = task.reward_funcs
        return Subject(lambda seed: smollm2(), reward, task.train_dataset, task.eval_dataset, 0.01, {})
    reward = {"letters": letters, "digits": digits_last}[name]
    return Subject(tiny_model, reward, numbers(10, 56), numbers(66, 32), 0.04, {"bf16": False})


def trained(chosen: Subject, keys: Sequence[str], seed: int, **settings: Any) -> dict[str, float]:
    """The held-out reward at the end of a run, and medians of some metrics of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = chosen.trainer(chosen.config(seed, output_dir=folder, sigma=chosen.sigma, **settings))
        trainer.train()
        found = {"held_out": trainer.evaluate()["eval_reward"]}
    for key in keys:
        values = [log[key] for log in trainer.state.log_history if log.get(key) is not None]
        if values:
            found[key] = statistics.median(values)
    return found


def print_medians(label: str, runs: list[dict[str, float]]) -> None:
    """A line with the medians of what runs found, and the held-out reward of each."""
    medians = {key: statistics.median(found[key] for found in runs) for key in runs[0]}
    print(
        f"{label}: "
        + ", ".join(f"{key} {value:.3g}" for key, value in medians.items())
        + f"; held_out of the seeds: {sorted(round(found['held_out'], 3) for found in runs)}",
        flush=True,
    )
