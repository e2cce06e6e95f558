import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from datasets import Dataset

from ..rewards.countdown import countdown_reward
from .task import Task


LARGEST_NUMBER = 99
LARGEST_TARGET = 100

SYSTEM_PROMPT = (
    "You solve arithmetic puzzles. First reason step by step between <think> and </think>. "
    "Then write only your final equation between <answer> and </answer>."
)
USER_PROMPT = (
    "Find an equation that equals {target}. Use each of the numbers {numbers} exactly once, with +, -, *, / and "
    "parentheses as you need. For example, for the numbers 2, 3, 4 and the target 20 the final line would be "
    "<answer>(2 + 3) * 4</answer>."
)


def countdown(train_size: int = 200, eval_size: int = 100, seed: int = 0) -> Task:
    """
    Countdown: combine three or four given numbers into an equation that equals a target. Every puzzle has a solution,
    half of them have three numbers and half four, and no two puzzles of the task, in either split, have the same
    numbers (in any order) and target.

    Args:
        train_size (`int`, *optional*, defaults to `200`):
            Number of training puzzles.
        eval_size (`int`, *optional*, defaults to `100`):
            Number of evaluation puzzles. They depend on `eval_size` and `seed` alone, so that runs with different
            `train_size` can be compared.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the puzzles.

    Returns:
        [`Task`]:
            Task with the columns `prompt` (conversational), `numbers` (`list[int]`, each 1 to 99) and `target` (`int`,
            1 to 100).

    Raises:
        ValueError: If `train_size` or `eval_size` is less than 1.
    """
    for name, size in (("train_size", train_size), ("eval_size", eval_size)):
        if size < 1:
            raise ValueError(f"{name}={size} leaves the split without a puzzle: {name} must be 1 or more.")
    puzzles = _distinct_puzzles(random.Random(seed))
    eval_rows = [_row(*puzzle) for puzzle in islice(puzzles, eval_size)]
    train_rows = [_row(*puzzle) for puzzle in islice(puzzles, train_size)]
    return Task("countdown", Dataset.from_list(train_rows), Dataset.from_list(eval_rows), [countdown_reward])


def _distinct_puzzles(rng: random.Random) -> Iterator[tuple[list[int], int]]:
    """Endless stream of solvable puzzles, with three and four numbers in turn."""
    seen: set[tuple[tuple[int, ...], int]] = set()
    while True:
        numbers = [rng.randint(1, LARGEST_NUMBER) for _ in range(3 + len(seen) % 2)]
        target = _random_result(numbers, rng)
        key = (tuple(sorted(numbers)), target)
        if target <= LARGEST_TARGET and key not in seen:
            seen.add(key)
            yield numbers, target


def _random_result(numbers: list[int], rng: random.Random) -> int:
    """Value of a random expression that uses each number once and never leaves the positive integers."""
    values = list(numbers)
    while len(values) > 1:
        rng.shuffle(values)
        low, high = sorted((values.pop(), values.pop()))
        results = [high + low, high * low]
        if high > low:
            results.append(high - low)
        if high % low == 0:
            results.append(high // low)
        values.append(rng.choice(results))
    return values[0]


def _row(numbers: list[int], target: int) -> dict[str, Any]:
    user_prompt = USER_PROMPT.format(target=target, numbers=", ".join(map(str, numbers)))
    prompt = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": user_prompt}]
    return {"prompt": prompt, "numbers": numbers, "target": target}
