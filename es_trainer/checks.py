"""What is refused before training begins, and why."""

from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .config import ESConfig
from .fields import require
from .paths import check_local
from .precision import is_quantized
from .weights.layouts.zero3 import is_partitioned


def check_settled_prompts(args: ESConfig, of_sets: np.ndarray) -> None:
    """
    Raises:
        `ValueError`: If prompts are to be passed over by their rewards, but no reward is about a prompt.
    """
    require(
        args,
        args.skip_settled_prompts == 0 or not of_sets.all(),
        "skip_settled_prompts",
        "all rewards are about the whole set of a member's completions, so no prompt has one of its own. Set it to 0.",
    )


def check_model(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """
    Raises:
        `TypeError`: If the model is no causal language model.
        `ValueError`: If it lies on several devices, or no tokenizer is given and it has no name to find one by.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel) and not (isinstance(model, nn.Module) and is_peft_model(model)):
        raise TypeError(
            f"`model` is a {kind}, but must be the name or folder of a model, a `PreTrainedModel` or a `PeftModel`. "
            "If it holds such a model (a pipeline, a wrapper for several devices), give the model itself."
        )
    if is_peft_model(model):
        for adapter in model.peft_config.values():
            check_adapter("model", adapter)
    base = model.get_base_model() if is_peft_model(model) else model
    kind = type(base).__name__
    if not base.can_generate():
        raise TypeError(
            f"`model` is a {kind}, which cannot generate: it has no head for causal language modelling. Load it with "
            "`AutoModelForCausalLM`."
        )
    if base.config.is_encoder_decoder:
        raise TypeError(f"`model` is a {kind}, an encoder-decoder. Only causal language models are supported.")
    if base.main_input_name != "input_ids":
        raise TypeError(
            f"`model` is a {kind}, which goes on from `{base.main_input_name}` rather than from a text. Only causal "
            "language models are supported."
        )
    masked = base.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and base.config.to_dict().get("is_decoder") is False:
        raise TypeError(
            f"`model` is a {kind} with `is_decoder=False`, an encoder, in which tokens see those after them. Only "
            "causal language models are supported."
        )
    _check_one_device(base)
    if tokenizer is None and not base.config._name_or_path:
        raise ValueError(
            f"`processing_class` is missing: `model` is a {kind} without a name (`model.config._name_or_path`) to "
            "load its tokenizer by. Give the tokenizer."
        )


def _check_one_device(model: PreTrainedModel) -> None:
    places = {str(place) for place in vars(model).get("hf_device_map", {}).values()}
    devices = {str(p.device) for p in model.parameters() if not is_partitioned(p)}  # disk is "meta"
    if len(places) > 1 or len(devices) > 1:
        found = ", ".join(sorted(places if len(places) > 1 else devices))
        raise ValueError(
            f"The model lies on several devices ({found}; `device_map`), but a process perturbs and computes with "
            "weights on one. Leave `device_map` out, or launch with recipes/accelerate_configs/zero3.yaml if the "
            "weights do not fit on one device."
        )


def check_arguments(args: ESConfig, model: Any, optimizers: Any, quantization_config: Any, peft_config: Any) -> None:
    """What can be told before a model is loaded, whatever evaluates the members."""
    if args.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"The device is {args.device.type!r}, but noise can be made on 'cpu' and 'cuda' only. Set use_cpu=True."
        )
    optimizer, scheduler = optimizers
    if optimizer is not None:
        raise ValueError(
            f"`optimizers=({type(optimizer).__name__}, ...)` is not supported: the evolution strategy is the "
            "optimizer. Choose its update rule with `es_optimizer`, and give `(None, scheduler)` for a scheduler of "
            "your own."
        )
    if scheduler is not None and not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise TypeError(f"`optimizers` has a {type(scheduler).__name__} for a scheduler: give an `LRScheduler`.")
    if isinstance(model, str):
        check_local("model", model, folder=True)
    options = args.model_init_kwargs or {}
    split = {"tp_plan", "distributed_config"} & options.keys()
    if split or (isinstance(model, nn.Module) and any(isinstance(p.data, DTensor) for p in model.parameters())):
        raise ValueError(
            f"The model is split over processes by Transformers ({', '.join(split) or 'it has DTensors'}), which is "
            "not supported. Launch with recipes/accelerate_configs/zero3.yaml to partition the weights."
        )
    for name, value in (("model_init_kwargs", args.model_init_kwargs), ("quantization_config", quantization_config)):
        if not isinstance(model, str) and value is not None:
            raise ValueError(
                f"`{name}={value!r}` is for models given as a string, but the model is already loaded. Remove it, or "
                "give the model's name."
            )
    if quantization_config is not None and "quantization_config" in options:
        raise ValueError(
            "`quantization_config` is given to the trainer and in `model_init_kwargs`. Leave it out of the latter."
        )
    if (quantization_config or options.get("quantization_config")) and peft_config is None:
        raise ValueError(
            "`quantization_config` without `peft_config`: quantized weights cannot be perturbed. Give a `peft_config` "
            "to train an adapter, or set weight_quantization='int8' in its place to train all weights."
        )
    if peft_config is not None:
        check_adapter("peft_config", peft_config)
    if isinstance(model, nn.Module) and peft_config is None and not is_peft_model(model):
        quantized = next((name for name, module in model.named_modules() if is_quantized(module)), None)
        if quantized is not None:
            raise ValueError(
                f"The model is quantized (`{quantized}`), and quantized weights cannot be perturbed. Give a "
                "`peft_config` to train an adapter, or load the model without quantization (and set "
                "weight_quantization='int8', if it does not fit into memory otherwise)."
            )


def check_adapter(name: str, peft_config: Any) -> None:
    """
    Raises:
        `TypeError`: If it is no `PeftConfig`.
        `ValueError`: If it is of an adapter that does more than change the model's modules: the evolution strategy
            generates with those alone.
    """
    # Imported where it is used: importing peft takes seconds
    from peft import PeftConfig, PeftType

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"`{name}` must be a `peft.PeftConfig`, but is a {type(peft_config).__name__}.")
    if peft_config.is_prompt_learning or peft_config.peft_type == PeftType.XLORA:
        does = "puts learned tokens before the prompt" if peft_config.is_prompt_learning else "runs the model twice"
        raise ValueError(
            f"`{name}` has a {type(peft_config).__name__}, an adapter that {does}, which is not supported: the "
            "evolution strategy trains adapters that change the model's layers. Use one of those, such as "
            "`LoraConfig`."
        )
