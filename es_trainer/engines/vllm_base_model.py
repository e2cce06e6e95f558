"""The base model of a run in the workers of a vLLM server: one of them loads it, and each keeps its part of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel


if TYPE_CHECKING:
    from vllm.distributed.parallel_state import GroupCoordinator


@dataclass(frozen=True)
class Kind:
    """
    What all workers know of a parameter.

    Args:
        shape (`torch.Size`):
            Shape of the whole parameter.
        dtype (`torch.dtype`):
            The dtype that it was loaded in.
    """

    shape: torch.Size
    dtype: torch.dtype


def everywhere(condition: bool, group: "GroupCoordinator") -> bool:
    """Whether something is so in all workers of a group."""
    answers: list[bool] = [False] * group.world_size
    dist.all_gather_object(answers, condition, group=group.cpu_group)
    return all(answers)


def load_in_first(
    load: Callable[[], PreTrainedModel], group: "GroupCoordinator"
) -> tuple[PreTrainedModel | None, dict[str, Kind]]:
    """
    Load a model in the first worker of a group only: a host has no room for a copy in each of them.

    Args:
        load (`Callable[[], PreTrainedModel]`):
            Loads it into host memory.
        group (`GroupCoordinator`):
            vLLM's tensor-parallel group.

    Returns:
        `tuple[PreTrainedModel | None, dict[str, Kind]]`: the model, or `None` in the other workers, and what is known
        of its parameters.

    Raises:
        `RuntimeError`: In the other workers, if `load` raises something in the first.
    """
    model = None
    known: list[dict[str, Kind] | None] = [None]
    try:
        if group.is_first_rank:
            model = load()
            known = [{name: Kind(p.shape, p.dtype) for name, p in model.named_parameters()}]
    finally:
        dist.broadcast_object_list(known, src=group.first_rank, group=group.cpu_group)
    if known[0] is None:
        raise RuntimeError("The first worker of the server could not load the model.")
    return model, known[0]


def hand_out(
    model: PreTrainedModel | None, kinds: Mapping[str, Kind], group: "GroupCoordinator"
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Give every worker each parameter in turn, after which the model has it no more.

    Args:
        model ([`~transformers.PreTrainedModel`], *optional*):
            The model, in the first worker.
        kinds (`Mapping[str, Kind]`):
            What `load_in_first` returned.
        group (`GroupCoordinator`):
            vLLM's tensor-parallel group.

    Yields:
        `tuple[str, torch.Tensor]`: name and weights of the whole parameter.
    """
    for name, kind in kinds.items():
        if model is None:
            whole = torch.empty(kind.shape, dtype=kind.dtype)
        else:
            parameter: nn.Parameter = model.get_parameter(name)
            whole = parameter.data.contiguous()
            parameter.data = whole.new_empty(0)
        dist.broadcast(whole.view(-1).view(torch.uint8), src=group.first_rank, group=group.cpu_group)
        yield name, whole
