"""A tool that the model calls while it answers: the script is one for GRPOTrainer, with two names changed."""

import random

from datasets import Dataset
from es_trainer import ESConfig, ESTrainer


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product.
    """
    return a * b


def question(a: int, b: int) -> str:
    return f"What is {a} times {b}?"


def is_right(completions, product, **kwargs):
    answers = [completion[-1]["content"] for completion in completions]
    return [float(str(number) in answer) for answer, number in zip(answers, product, strict=True)]


if __name__ == "__main__":
    numbers = random.Random(0)
    pairs = [(numbers.randint(100, 999), numbers.randint(100, 999)) for _ in range(256)]
    dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": question(a, b)}], "product": a * b} for a, b in pairs]
    )
    trainer = ESTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=is_right,
        args=ESConfig(output_dir="Qwen2.5-0.5B-multiply", max_completion_length=256, logging_steps=1),
        train_dataset=dataset,
        tools=[multiply],
    )
    trainer.train()
    trainer.save_model()
