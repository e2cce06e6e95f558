"""The initial weights for `anchor_weights="model"`: read from the model's files at each update, not kept."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..config import ESConfig
from ..fields import require
from ..weights.part import Part
from .trainer_inputs import TrainerInputs


def check_anchor_weights(args: ESConfig, inputs: TrainerInputs) -> None:
    """
    Raises:
        `ValueError`: If the initial weights cannot be where `anchor_weights` says.
    """
    if args.anchor_decay == 0:
        return
    require(
        args,
        args.anchor_weights == "device" or not args.on_servers or inputs.has_adapter,
        "anchor_weights",
        "vLLM servers keep the initial weights beside their masters; leave it out.",
    )
    if args.anchor_weights != "model":
        return
    require(
        args,
        inputs.source is not None and not inputs.has_adapter,
        "anchor_weights",
        "the initial weights are read from the files of the model. Give `model` by its name or folder and without an "
        "adapter, or set it to 'host'.",
    )
    require(
        args,
        not (args.save_only_model and args.load_best_model_at_end),
        "anchor_weights",
        "with save_only_model and load_best_model_at_end, a further call of train() begins with other weights than "
        "`model` has. Leave out one of them, or set it to 'host'.",
    )


class InitialWeights:
    """
    Reads the weights that a model was loaded with from its safetensors files, which are mapped into memory: what is
    read is in the page cache at most, which the system takes back when it needs the memory.

    Args:
        model (`nn.Module`):
            The model. Parameters that are tied are found in the files by any of their names.
        source (`str`):
            Its name or folder. Nothing is downloaded.
        options (`dict[str, Any]`):
            The keyword arguments that it was loaded with.

    Raises:
        `ValueError`: If there are no such files.
    """

    def __init__(self, model: nn.Module, source: str, options: dict[str, Any]):
        paths = _paths(source, options)
        if not paths:
            raise ValueError(f"`anchor_weights='model'` is not valid: {source!r} has no safetensors files. {WAY_OUT}")
        self._stamps = {path: _stamp(path) for path in paths}
        self._files = {name: (path, tensor) for path in paths for name, tensor in load_file(path).items()}
        self._names: dict[str, list[str]] = {}
        tied: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names[name] = tied.setdefault(parameter, [])
            self._names[name].append(name)

    def __call__(self, part: Part, start: int, stop: int) -> torch.Tensor:
        """
        The weights `start` to `stop` of a part of a parameter, in the dtype of the file.

        Raises:
            `ValueError`: If no file has the parameter under its name and in its shape.
            `RuntimeError`: If the file was changed since the model was loaded.
        """
        found = [self._files[name] for name in self._names[part.name] if name in self._files]
        if not found or found[0][1].shape != part.shape:
            raise ValueError(
                f"`anchor_weights='model'` is not valid: the files of the model have no `{part.name}` of shape "
                f"{list(part.shape)}, because Transformers renames or rearranges it as it loads the model. {WAY_OUT}"
            )
        path, tensor = found[0]
        if _stamp(path) != self._stamps[path]:
            raise RuntimeError(
                f"{path} was changed since the model was loaded, and `anchor_weights='model'` reads the initial "
                "weights from it. Restore it and resume from the last checkpoint."
            )
        return part.piece_of(tensor, start, stop)


WAY_OUT = "Set it to 'host', which keeps a copy in host memory."


def _paths(source: str, options: dict[str, Any]) -> list[str]:
    """The model's safetensors files, found where Transformers has loaded them from, wherever the process goes."""
    where = {key: options[key] for key in ("revision", "cache_dir", "subfolder") if key in options}
    where |= {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    single = cached_file(source, SAFE_WEIGHTS_NAME, **where)
    if single is not None:
        return [os.path.abspath(single)]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **where)
    if index is None:
        return []
    files = json.loads(Path(index).read_text())["weight_map"].values()
    return [str(Path(index).absolute().with_name(file)) for file in sorted(set(files))]


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
