"""The base model of a run in the workers of a vLLM server: the first loads it, and each keeps its part of it."""

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
class ParameterInfo:
    """
    Shape and dtype of a parameter, which all workers know.

    Args:
        shape (`torch.Size`):
            Shape of the whole parameter.
        dtype (`torch.dtype`):
            The dtype that it was loaded in.
    """

    shape: torch.Size
    dtype: torch.dtype


def all_workers(condition: bool, group: "GroupCoordinator") -> bool:
    """Whether a condition holds in all workers of a group."""
    conditions: list[bool] = [False] * group.world_size
    dist.all_gather_object(conditions, condition, group=group.cpu_group)
    return all(conditions)


def load_on_first_rank(
    load: Callable[[], PreTrainedModel], group: "GroupCoordinator"
) -> tuple[PreTrainedModel | None, dict[str, ParameterInfo]]:
    """
    Load a model in the first worker of a group only: a host may have no room for a copy in each worker.

    Args:
        load (`Callable[[], PreTrainedModel]`):
            Loads it into host memory.
        group (`GroupCoordinator`):
            vLLM's tensor-parallel group.

    Returns:
        `tuple[PreTrainedModel | None, dict[str, ParameterInfo]]`: the model, or `None` in the other workers,
        and shape and dtype of its parameters.

    Raises:
        `RuntimeError`: In the other workers, if `load` raises something in the first.
    """
    model = None
    known: list[dict[str, ParameterInfo] | None] = [None]
    try:
        if group.is_first_rank:
            model = load()
            known = [{name: ParameterInfo(p.shape, p.dtype) for name, p in model.named_parameters()}]
    finally:
        dist.broadcast_object_list(known, src=group.first_rank, group=group.cpu_group)
    if known[0] is None:
        raise RuntimeError("The first worker of the server could not load the model.")
    return model, known[0]


def broadcast_parameters(
    model: PreTrainedModel | None, infos: Mapping[str, ParameterInfo], group: "GroupCoordinator"
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Send every worker each parameter in turn. The model does not keep a parameter that was sent.

    Args:
        model ([`~transformers.PreTrainedModel`], *optional*):
            The model, in the first worker.
        infos (`Mapping[str, ParameterInfo]`):
            What `load_on_first_rank` returned.
        group (`GroupCoordinator`):
            vLLM's tensor-parallel group.

    Yields:
        `tuple[str, torch.Tensor]`: name and weights of the whole parameter.
    """
    for name, info in infos.items():
        if model is None:
            whole = torch.empty(info.shape, dtype=info.dtype)
        else:
            parameter: nn.Parameter = model.get_parameter(name)
            whole = parameter.data.contiguous()
            parameter.data = whole.new_empty(0)
        dist.broadcast(whole.view(-1).view(torch.uint8), src=group.first_rank, group=group.cpu_group)
        yield name, whole
