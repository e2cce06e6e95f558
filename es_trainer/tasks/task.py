from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset


@dataclass(frozen=True)
class Task:
    """
    Everything a trainer needs to learn one skill: data to train on, data to evaluate on, and the reward.

    Args:
        name (`str`):
            Short name, for logs and output folders.
        train_dataset (`datasets.Dataset`):
            Rows to train on, with a `prompt` column and the columns that the reward functions read.
        eval_dataset (`datasets.Dataset`):
            Rows to evaluate on, with the same columns and no row in common with `train_dataset`.
        reward_funcs (`list[Callable]`):
            Reward functions, in the protocol of TRL's `GRPOTrainer`.
    """

    name: str
    train_dataset: Dataset
    eval_dataset: Dataset
    reward_funcs: list[Callable[..., list[float | None]]]
