from typing import Any

from .boxed import boxed_task
from .task import Task


DATASET = "openai/gsm8k"


def gsm8k(
    dataset_name: str = DATASET,
    dataset_config: str | None = None,
    train_size: int | None = None,
    eval_size: int | None = None,
    seed: int = 0,
) -> Task:
    r"""
    [GSM8K](https://huggingface.co/papers/2110.14168): grade school word problems with a number as the answer. Needs
    math-verify.

    Args:
        dataset_name (`str`, *optional*, defaults to `"openai/gsm8k"`):
            Name of a dataset on the Hub, or a folder with `train.jsonl` and `test.jsonl`, with the columns `question`
            and `answer`, of which the number after the last `####` counts.
        dataset_config (`str` or `None`, *optional*, defaults to `None`):
            Configuration of the dataset. `None` is `"main"` for `"openai/gsm8k"`.
        train_size (`int` or `None`, *optional*, defaults to `None`):
            Number of training problems. `None` takes all.
        eval_size (`int` or `None`, *optional*, defaults to `None`):
            Number of evaluation problems, out of the split `"test"`. `None` takes all.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the training problems, and so of which ones are taken. Evaluation problems keep their
            order.

    Returns:
        [`Task`]:
            Task with the columns `prompt` (conversational) and `solution` (`str`, the number in `\boxed{}`). The
            reward is [`accuracy_reward`].

    Raises:
        ImportError: If math-verify is not installed.
        ValueError: If the dataset lacks a split or a column, or has fewer problems than asked for.
    """
    if dataset_config is None and dataset_name == DATASET:
        dataset_config = "main"
    columns = ("question", "answer")
    return boxed_task("gsm8k", dataset_name, dataset_config, columns, _read_row, train_size, eval_size, seed)


def _read_row(row: dict[str, Any]) -> tuple[str, str]:
    number = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return row["question"], rf"\boxed{{{number}}}"
