r"""What tasks whose answer stands in `\boxed{}` have in common."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from datasets import Dataset, load_dataset

from ..rewards.accuracy import accuracy_reward
from .task import Task


SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."


def boxed_task(
    name: str,
    dataset_name: str,
    dataset_config: str | None,
    columns: Sequence[str],
    read_row: Callable[[dict[str, Any]], tuple[str, str] | None],
    train_size: int | None,
    eval_size: int | None,
    seed: int,
) -> Task:
    """
    Make a task from a dataset of problems.

    Args:
        name (`str`):
            Name of the task.
        dataset_name (`str`):
            Name of a dataset on the Hub, or a folder. It needs the splits `"train"` and `"test"`.
        dataset_config (`str` or `None`):
            Its configuration.
        columns (`Sequence[str]`):
            Columns that it needs.
        read_row (`Callable`):
            Gives the problem and the solution of a row, or `None` to leave it out.
        train_size, eval_size (`int` or `None`):
            Number of training and evaluation problems. `None` takes all.
        seed (`int`):
            Seed of the order of the training problems. Evaluation problems keep their order.

    Returns:
        [`Task`]: Task with the columns `prompt` (conversational) and `solution` (`str`).

    Raises:
        ImportError: If math-verify is not installed.
        ValueError: If the dataset lacks a split or a column, or has fewer problems than asked for.
    """
    if find_spec("math_verify") is None:
        raise ImportError(f"The task {name!r} compares answers with math-verify: `pip install math-verify`.")
    splits = load_dataset(dataset_name, dataset_config)
    datasets = []
    for split, option, size in (("train", "train_size", train_size), ("test", "eval_size", eval_size)):
        if split not in splits:
            raise ValueError(
                f"dataset_name={dataset_name!r} has no split {split!r}, only {', '.join(map(repr, splits))}: the task "
                f"{name!r} trains on 'train' and evaluates on 'test'. A folder has them as train.jsonl and test.jsonl."
            )
        missing = [column for column in columns if column not in splits[split].column_names]
        if missing:
            raise ValueError(
                f"dataset_name={dataset_name!r} has no column {', '.join(map(repr, missing))} in the split {split!r}, "
                f"only {', '.join(map(repr, splits[split].column_names))}: rename its columns to those that the task "
                f"{name!r} reads, {', '.join(map(repr, columns))}."
            )
        problems = [problem for row in splits[split] if (problem := read_row(row)) is not None]
        if not 1 <= (len(problems) if size is None else size) <= len(problems):
            raise ValueError(
                f"{option}={size} is not possible: {len(problems)} problems of the split {split!r} of "
                f"dataset_name={dataset_name!r} can be used."
            )
        dataset = Dataset.from_list([_row(*problem) for problem in problems])
        if split == "train":
            dataset = dataset.shuffle(seed)
        datasets.append(dataset.take(len(problems) if size is None else size))
    return Task(name, *datasets, [accuracy_reward])


def _row(problem: str, solution: str) -> dict[str, Any]:
    prompt = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": problem}]
    return {"prompt": prompt, "solution": solution}
