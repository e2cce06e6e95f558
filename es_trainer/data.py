"""Datasets: what is refused, and the rows of a batch."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, List, Value

from .config import ESConfig
from .fields import require
from .images import IMAGE_COLUMNS, images_of, with_images


NO_PROMPT = [{"role": "user", "content": ""}]  # of rows that need none
MEDIA_COLUMNS = ("video", "videos", "audio", "audios")
TABLE_FORMATS = ("arrow", "pandas", "polars")  # whose rows are tables


def check_datasets(args: ESConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """What can be told about datasets before a model is loaded."""
    if isinstance(train_dataset, dict):
        raise TypeError(
            f"`train_dataset` is a {type(train_dataset).__name__} with the splits {list(train_dataset)}: give one of "
            "them, for instance train_dataset=dataset['train']."
        )
    check_dataset("train_dataset", train_dataset, args, "num_prompts_per_step", args.largest_num_rows)
    for name, dataset in by_name(eval_dataset).items():
        check_eval_dataset(name, dataset, args)
    require(
        args,
        args.skip_settled_prompts == 0 or not isinstance(train_dataset, IterableDataset),
        "skip_settled_prompts",
        "the rows of a stream cannot be drawn again. Give a `Dataset`, or set it to 0.",
    )
    for name in ("eval_kl_prompts", "auto_step"):
        require(
            args,
            getattr(args, name) == 0 or bool(by_name(eval_dataset)),
            name,
            "it needs prompts of an `eval_dataset`: give one, or set it to 0.",
        )
    if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
        raise ValueError(
            f"`max_steps={args.max_steps}`: the length of an `IterableDataset` is not known. Set `max_steps` to the "
            "number of updates."
        )


def check_eval_dataset(name: str, dataset: Any, args: ESConfig) -> None:
    """Raise what speaks against an evaluation dataset."""
    check_dataset(name, dataset, args, "per_device_eval_batch_size", args.eval_batch_size)


def check_dataset(name: str, dataset: Any, args: ESConfig, batch_option: str, batch_size: int) -> None:
    """
    Raise what speaks against a dataset.

    Args:
        name (`str`):
            What errors call it.
        dataset (`Any`):
            The dataset, or `None`.
        args ([`ESConfig`]):
            Says whether a last batch that is not full is dropped.
        batch_option (`str`):
            Name of the option for the number of rows in a batch.
        batch_size (`int`):
            Number of rows in a batch.
    """
    if dataset is None:
        return
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(f"`{name}` must be a `Dataset` or `IterableDataset`, but is a {type(dataset).__name__}.")
    if isinstance(dataset, Dataset):
        if len(dataset) == 0:
            raise ValueError(f"`{name}` is empty: give at least one row.")
        if args.dataloader_drop_last and len(dataset) < batch_size:
            raise ValueError(
                f"`{name}` has {len(dataset)} rows, fewer than the {batch_size} of a batch (`{batch_option}`), and "
                f"with `dataloader_drop_last=True` they are all dropped. Lower `{batch_option}` or set "
                "dataloader_drop_last=False."
            )
        if dataset.format["type"] in TABLE_FORMATS:
            raise ValueError(
                f"`{name}` has the format {dataset.format['type']!r}, in which rows are tables. Give "
                "dataset.with_format(None)."
            )
    columns = _columns(dataset)
    if columns is not None:
        _check_columns(name, columns)


def _columns(dataset: Dataset | IterableDataset) -> list[str] | None:
    """Columns of the rows, or `None` if a stream only knows them when it is read."""
    if isinstance(dataset, IterableDataset):
        return dataset.column_names
    if dataset.format["type"] == "custom":  # a transform makes columns of its own
        return list(dataset[0])
    return dataset.column_names if dataset.format["output_all_columns"] else dataset.format["columns"]


def _check_columns(name: str, columns: list[str]) -> None:
    if "prompt" not in columns:
        raise ValueError(
            f"`{name}` has no column 'prompt'; its columns are {columns}. Rename the one with the prompts: "
            "dataset.rename_column(..., 'prompt')."
        )
    media = [column for column in columns if column in MEDIA_COLUMNS]
    if media:
        raise ValueError(
            f"`{name}` has the column {media[0]!r}, but video and audio are not supported: the model would not see "
            f"them. To train on what else there is, give dataset.remove_columns({media!r})."
        )


def image_columns(dataset: Any) -> list[str]:
    """The columns with images of a dataset's rows, as far as a stream knows its columns."""
    columns = _columns(dataset) if isinstance(dataset, (Dataset, IterableDataset)) else None
    return [column for column in IMAGE_COLUMNS if column in (columns or [])]


def has_images(dataset: Any) -> bool:
    """Whether prompts of a dataset have images: of a stream, whether its first one has."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return False
    if image_columns(dataset):
        return True
    if isinstance(dataset, IterableDataset):
        first = next(iter(dataset), {})
        return bool(set(IMAGE_COLUMNS) & set(first) or images_of(first.get("prompt")))
    # Not all of many texts have to be looked through
    made_by_transform = dataset.format["type"] == "custom"
    if "prompt" not in _columns(dataset) or (not made_by_transform and _texts_alone(dataset.features["prompt"])):
        return False
    return any(images_of(prompt) for batch in prompts("dataset", dataset, batch_size=1) for prompt in batch)


def _texts_alone(feature: Any) -> bool:
    """Whether prompts of a type are texts, or messages whose content is a text."""
    if isinstance(feature, List) and isinstance(feature.feature, dict):
        feature = feature.feature.get("content")
    return isinstance(feature, Value)


def refuse_images(prompts: Iterable[Any], reason: str) -> None:
    """
    Raises:
        `ValueError`: If a prompt has images.
    """
    if any(map(images_of, prompts)):
        raise ValueError(f"A prompt has images, but {reason}, or leave the images out.")


def with_prompts(dataset: Any) -> Any:
    """A dataset, or a `dict` of them, with a prompt in all rows, for those who need none."""
    if isinstance(dataset, dict):
        return {name: with_prompts(part) for name, part in dataset.items()}
    if not isinstance(dataset, (Dataset, IterableDataset)) or "prompt" in (_columns(dataset) or ["prompt"]):
        return dataset
    return dataset.map(lambda row: {"prompt": NO_PROMPT})


def by_name(eval_dataset: Any) -> dict[str, Any]:
    """Evaluation datasets by the names that errors call them."""
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{key!r}]": dataset for key, dataset in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}


def prompts(name: str, dataset: Dataset, batch_size: int = 1000) -> Iterator[list[Any]]:
    """The prompts of all rows, with their images, in batches."""
    if dataset.format["type"] != "custom":  # a transform may need the other columns
        own = [column for column in IMAGE_COLUMNS if column in _columns(dataset)]
        dataset = dataset.select_columns(["prompt", *own])
    first = 0
    for batch in dataset.iter(batch_size):
        _check_columns(name, list(batch))
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        yield [_prompt_of(name, row, number) for number, row in enumerate(rows, first)]
        first += len(rows)


def collate(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """
    A batch: the rows as they are, with prompts of Python's own types whatever the dataset's format, and with their
    images in the prompts' messages.
    """
    for row in rows:
        if not isinstance(row, Mapping):
            raise TypeError(f"`{name}` has rows of type {type(row).__name__}, but they must be dictionaries.")
        _check_columns(name, list(row))
    return [{**row, "prompt": _prompt_of(f"A batch of `{name}`", row, number)} for number, row in enumerate(rows)]


def _prompt_of(name: str, row: Mapping[str, Any], number: int) -> Any:
    try:
        return with_images(row, _plain(row["prompt"]))
    except ValueError as error:
        raise ValueError(f"Row {number} of `{name}`: {error}") from error


def _plain(prompt: Any) -> Any:
    if isinstance(prompt, np.ndarray):  # the messages of a dataset in NumPy's format
        return prompt.tolist()
    return str(prompt) if isinstance(prompt, np.str_) else prompt


def shuffled(stream: IterableDataset, args: ESConfig) -> IterableDataset:
    """The stream in an order that `args.data_seed` determines, or `args.seed` without it: shuffled in a buffer."""
    return stream.shuffle(seed=args.seed if args.data_seed is None else args.data_seed)
