"""Adapters that a run makes, and that its replay makes again."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedModel


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def add_adapter(model: PreTrainedModel, peft_config: "PeftConfig", seed: int) -> "PeftModel":
    """Wrap a model with an adapter, whose random initial weights follow from the seed."""
    # Imported where it is used: importing peft takes seconds
    from peft import get_peft_model

    set_seed(seed)
    with _weights_on_cpu(model):
        return get_peft_model(model, peft_config)


@contextlib.contextmanager
def _weights_on_cpu(model: nn.Module) -> Iterator[None]:
    """
    Inside, parameters without weights are float32 tensors on CPU that take no memory: PEFT moves an adapter to the
    device of the base model's weights, and to their dtype, where those on the meta device would lose it.
    """
    places = [(m, n, p) for m in model.modules() for n, p in m.named_parameters(recurse=False) if p.is_meta]
    for module, name, parameter in places:
        zeros = torch.zeros((), dtype=torch.float32, device="cpu").expand(parameter.shape)
        setattr(module, name, nn.Parameter(zeros, requires_grad=parameter.requires_grad))
    try:
        yield
    finally:
        for module, name, parameter in places:
            parameter.requires_grad = getattr(module, name).requires_grad
            setattr(module, name, parameter)


def to_json(peft_config: "PeftConfig") -> dict[str, Any]:
    """The config as it is written into a history."""
    values = peft_config.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def from_json(values: dict[str, Any]) -> "PeftConfig":
    """The config that `to_json` wrote."""
    from peft import PeftConfig

    return PeftConfig.from_peft_type(**values)
