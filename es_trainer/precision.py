"""In which dtype a language model computes with each of its tensors: frozen and trained ones, buffers, quantized."""

import copy

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights

from .deepspeed_config import unpartitioned
from .weights.frozen import WORKING_DTYPES
from .weights.layouts.zero3 import is_partitioned


WRAPPERS = (".base_layer", ".original_module")  # what PEFT puts between a module and what it wraps


def is_quantized(module: nn.Module) -> bool:
    """Whether a module itself holds packed, scaled or otherwise encoded weights."""
    parameters = module.parameters(recurse=False)
    buffers = (buffer for buffer in module.buffers(recurse=False) if buffer.is_floating_point())
    return any(t.dtype not in WORKING_DTYPES or is_traceable_wrapper_subclass(t.data) for t in (*parameters, *buffers))


def frozen_tensors(model: nn.Module, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """
    The parameters that are not trained, and the buffers that follow the working dtype.

    Quantized modules compute with what they hold, so all of it stays as it is: weights, scales and biases. Other
    tensors are computed with in the dtype that they would have if the model was loaded in the working dtype.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        dtype (`torch.dtype`, *optional*):
            The working dtype. `None` keeps each tensor's.
    """
    encoded = {tensor for module in model.modules() if is_quantized(module) for tensor in _own(module)}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    if dtype is not None:
        base = model.get_base_model() if is_peft_model(model) else model
        kept = kept_in_float32(model, dtype)
        frozen = {name: p for name, p in frozen.items() if is_partitioned(p) or name not in kept}
        frozen |= _buffers(base, dtype)
    return [tensor for tensor in frozen.values() if tensor not in encoded or is_partitioned(tensor)]


def kept_in_float32(model: nn.Module, dtype: torch.dtype | None) -> set[str]:
    """Names of the parameters that the model's class keeps in float32 if it is loaded in the working dtype."""
    if dtype is None:
        return set()
    base = model.get_base_model() if is_peft_model(model) else model
    return {name for name, _ in model.named_parameters() if _stays_float32(base, name, dtype)}


def _own(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _stays_float32(model: PreTrainedModel, name: str, dtype: torch.dtype) -> bool:
    """Whether the model's class keeps a tensor in float32, whatever the dtype it is loaded in."""
    plan = model._get_dtype_plan(dtype)
    return bool(plan) and build_glob_alternation(list(plan))[0].search(name) is not None


def _buffers(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Those that `from_pretrained(dtype=dtype)` makes in that dtype: `inv_freq` of rotary embeddings stays float32."""
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point() and b.dtype != dtype}
    if not buffers:
        return {}
    with unpartitioned(), torch.device("meta"), no_init_weights():
        loaded = dict(type(model)._from_config(copy.deepcopy(model.config), dtype=dtype).named_buffers())

    def follows(name: str) -> bool:
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        return name in loaded and loaded[name].dtype == dtype and not _stays_float32(model, name, dtype)

    return {name: buffer for name, buffer in buffers.items() if follows(name)}
