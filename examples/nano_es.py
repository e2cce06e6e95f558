"""
The whole method in one file: evolution strategies at scale (arXiv 2509.24372) in plain torch and Transformers.

`ESTrainer` does the same with the same bits, faster, in parallel and after a crash; a test trains with both. Read this
first. `python examples/nano_es.py` teaches SmolLM2-135M-Instruct to answer briefly.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from es_trainer.noise import noise
from es_trainer.smollm2 import smollm2


QUESTIONS = {
    "What is the capital of France?": "Paris",
    "How many legs does a spider have?": "8",
    "What do bees make?": "Honey",
    "Which planet do we live on?": "Earth",
}


def make_noise(seed: int, name: str, weights: torch.Tensor) -> torch.Tensor:
    """Standard normals for a parameter: a pure function of the seed and its name, made again whenever needed."""
    return noise.fill(torch.empty(weights.numel()), name, seed).view_as(weights)


def ask(population_size: int, seed: int, step: int) -> list[int]:
    """The members of a step: a seed each, and each seed stands for a perturbation of all weights."""
    return (np.random.SeedSequence([seed, step]).generate_state(population_size, np.uint64) >> np.uint64(1)).tolist()


@contextmanager
def perturbed(model: PreTrainedModel, member: int, sigma: float) -> Iterator[None]:
    """The model with `weights + sigma * noise`. Afterwards the weights are what they were, to the bit."""
    before = {name: weights.detach().clone() for name, weights in model.named_parameters()}
    for name, weights in model.named_parameters():
        weights.data.add_(make_noise(member, name, weights), alpha=sigma)
    yield
    for name, weights in model.named_parameters():
        weights.data.copy_(before[name])


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[str]:
    """Greedy completions: all that differs between members is their weights."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def utilities(rewards: list[float]) -> np.ndarray:
    """Z-scores of the members' mean rewards (equation 4); zeros if all are equal."""
    fitness = np.array(rewards, dtype=np.float64)
    spread = fitness.std()
    return (fitness - fitness.mean()) / spread if spread > 0 else np.zeros(len(fitness))


@torch.no_grad()
def update(model: PreTrainedModel, members: list[int], z: np.ndarray, learning_rate: float) -> None:
    """`weights += learning_rate / N * sum(z * noise)`. No gradient, and no noise was kept: it is made again."""
    for name, weights in model.named_parameters():
        direction = torch.zeros_like(weights)
        for member, utility in zip(members, z.tolist(), strict=True):
            direction.add_(make_noise(member, name, weights), alpha=utility / len(members))
        weights.add_(direction.mul_(learning_rate))


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    reward: Callable[[list[str]], list[float]],
    steps: int,
    population_size: int = 30,
    sigma: float = 1e-3,
    learning_rate: float = 5e-4,
    max_new_tokens: int = 16,
    seed: int = 42,
) -> None:
    """
    Train all weights of a model, in place.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model in float32, on CPU.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a padding token.
        prompts (`list[str]`):
            What every member completes in every step.
        reward (`Callable[[list[str]], list[float]]`):
            Completions to rewards, one for each prompt.
        steps (`int`):
            Number of updates.
        population_size (`int`, *optional*, defaults to `30`):
            Members per step, N.
        sigma (`float`, *optional*, defaults to `1e-3`):
            Standard deviation of the perturbations.
        learning_rate (`float`, *optional*, defaults to `5e-4`):
            The paper's alpha.
        max_new_tokens (`int`, *optional*, defaults to `16`):
            Most tokens of a completion.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the run.
    """
    model.eval()
    for step in range(steps):
        members = ask(population_size, seed, step)
        rewards = []
        for member in members:
            with perturbed(model, member, sigma):
                rewards.append(float(np.mean(reward(generate(model, tokenizer, prompts, max_new_tokens)))))
        update(model, members, utilities(rewards), learning_rate)
        print(f"step {step + 1}: mean reward {np.mean(rewards):.2f}, best {max(rewards):.2f}", flush=True)


def brevity(completions: list[str]) -> list[float]:
    """Minus the distance in characters between an answer's length and that of the reference."""
    return [-abs(len(text) - len(answer)) for text, answer in zip(completions, QUESTIONS.values(), strict=True)]


if __name__ == "__main__":
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    train(model, tokenizer, prompts, brevity, steps=3, population_size=16, sigma=0.01, learning_rate=0.02)
    for question, answer in zip(QUESTIONS, generate(model, tokenizer, prompts, 16), strict=True):
        print(f"{question} {answer}")
