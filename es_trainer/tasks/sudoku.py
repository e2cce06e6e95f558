from dataclasses import replace

from .reasoning_gym import reasoning_gym
from .task import Task


def sudoku(
    min_empty: int = 30, max_empty: int = 50, train_size: int = 200, eval_size: int = 100, seed: int = 0
) -> Task:
    """
    Sudoku: fill the empty cells of a 9x9 grid that has one solution. Needs `pip install 'es-trainer[tasks]'`.

    The second version of [the paper](https://huggingface.co/papers/2509.24372) trains on Sudoku, too, but
    the authors' code has neither its puzzles nor its reward. Here puzzles and reward are those of reasoning-gym. The
    task `reasoning_gym:mini_sudoku` has puzzles of 4x4.

    Args:
        min_empty, max_empty (`int`, *optional*, defaults to `30` and `50`):
            Least and largest number of empty cells, up to 64. There may be fewer, where one more would allow a second
            solution. Puzzles with more than 60 take seconds to make.
        train_size (`int`, *optional*, defaults to `200`):
            Number of training puzzles.
        eval_size (`int`, *optional*, defaults to `100`):
            Number of evaluation puzzles. They do not depend on `train_size`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the puzzles.

    Returns:
        [`Task`]:
            Task with the columns `prompt` (conversational) and `entry` (`str`, JSON). The reward is 1.0 for the
            solution in the format of the puzzle, and 0.9 times the share of right cells for another grid, given cells
            included. Rows that have not nine digits do not count, and longer answers get less.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If the numbers of empty cells are not possible, or `train_size` or `eval_size` is less than 1.
    """
    task = reasoning_gym("sudoku", train_size, eval_size, seed, min_empty=min_empty, max_empty=max_empty)
    return replace(task, name="sudoku")
