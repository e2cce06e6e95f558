import re
from collections.abc import Sequence
from typing import Any

from .boxed import boxed_task
from .task import Task


def math(
    dataset_name: str = "DigitalLearningGmbH/MATH-lighteval",
    dataset_config: str | None = None,
    levels: Sequence[int] = (3, 4, 5),
    train_size: int | None = None,
    eval_size: int | None = None,
    seed: int = 0,
) -> Task:
    r"""
    [MATH](https://huggingface.co/papers/2103.03874): problems of mathematics competitions, of the levels that the
    paper trains on. Needs math-verify.

    Args:
        dataset_name (`str`, *optional*, defaults to `"DigitalLearningGmbH/MATH-lighteval"`):
            Name of a dataset on the Hub, or a folder with `train.jsonl` and `test.jsonl`, with the columns `problem`,
            `level` (`"Level 3"` or 3), `solution`, whose last `\boxed{}` is the answer, and optionally `answer`, which
            is then used in its place.
        dataset_config (`str` or `None`, *optional*, defaults to `None`):
            Configuration of the dataset.
        levels (`Sequence[int]`, *optional*, defaults to `(3, 4, 5)`):
            Levels of the problems, out of 1 to 5, for training and evaluation.
        train_size (`int` or `None`, *optional*, defaults to `None`):
            Number of training problems. `None` takes all.
        eval_size (`int` or `None`, *optional*, defaults to `None`):
            Number of evaluation problems, out of the split `"test"`. `None` takes all.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the training problems, and so of which ones are taken. Evaluation problems keep their
            order.

    Returns:
        [`Task`]:
            Task with the columns `prompt` (conversational) and `solution` (`str`, the answer in `\boxed{}`). The
            reward is [`accuracy_reward`].

    Raises:
        ImportError: If math-verify is not installed.
        ValueError: If the dataset lacks a split or a column, or has fewer problems than asked for.
    """
    wanted = {str(level) for level in levels}

    def read_row(row: dict[str, Any]) -> tuple[str, str] | None:
        if str(row["level"]).removeprefix("Level ") not in wanted:
            return None
        answer = row.get("answer") or last_boxed(row["solution"])
        # A solution without a box is left to math-verify as a whole
        return row["problem"], row["solution"] if answer is None else rf"\boxed{{{answer}}}"

    columns = ("problem", "level", "solution")
    return boxed_task("math", dataset_name, dataset_config, columns, read_row, train_size, eval_size, seed)


def last_boxed(solution: str) -> str | None:
    r"""
    What stands in the last `\boxed{...}`.

    Args:
        solution (`str`):
            Text in LaTeX. Some of MATH has `\fbox{...}`, or `\boxed 5`, which ends with the formula.

    Returns:
        `str` or `None`: The content, or `None` if there is no box or it is not closed.
    """
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*", solution))
    if not boxes:
        return None
    content = solution[boxes[-1].end() :]
    if not content.startswith("{"):
        return content.partition("$")[0].strip() or None
    depth = 0
    for token in re.finditer(r"\\.|[{}]", content, re.DOTALL):  # \{ and \} are characters of a set
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return content[1 : token.start()].strip()
    return None
