"""Models, tokenizers and adapters by what names them."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from . import adapters
from .checks import check_model
from .config import ESConfig
from .engines.vocabulary import check_special_tokens, require_pad_token
from .saving import make_savable
from .text_only import freeze_other_modalities


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


def load(
    model: "str | PreTrainedModel | PeftModel",
    tokenizer: PreTrainedTokenizerBase | None,
    args: ESConfig,
    quantization_config: "BitsAndBytesConfig | None",
    peft_config: "PeftConfig | None",
    with_weights: bool,
) -> "tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]":
    """
    The model and the tokenizer of a run, loaded if they are given by name, and made ready for training.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model, or its name or folder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, it is loaded by the model's name.
        args ([`ESConfig`]):
            The config.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model that is loaded.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to add.
        with_weights (`bool`):
            Whether this process needs the weights of a model that is loaded.

    Raises:
        `TypeError` or `ValueError`: If it cannot be trained.
    """
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if isinstance(model, str):
        model = load_model(model, options, quantization_config, with_weights)
        check_model(model, tokenizer)
    if tokenizer is None:
        tokenizer = load_tokenizer(model, options)
    require_pad_token(tokenizer)
    check_special_tokens(model, tokenizer)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if peft_config is not None:
        model = with_adapter(model, peft_config, args.seed)
    make_savable(model)
    freeze_other_modalities(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "All parameters of the model are frozen (requires_grad=False), so there is nothing to train. Set "
            "requires_grad=True on those to train."
        )
    return model, tokenizer


def load_model(
    name: str, options: dict[str, Any], quantization_config: "BitsAndBytesConfig | None", with_weights: bool
) -> PreTrainedModel:
    """A model by its name or folder, in float32 unless `dtype` is among the options."""
    if not with_weights:
        return _without_weights(name, options)
    if quantization_config is not None:
        options = {**options, "quantization_config": quantization_config}
    return AutoModelForCausalLM.from_pretrained(name, **{"dtype": torch.float32, **options})


def _without_weights(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """A model on the meta device, for which no weights are read or downloaded."""
    source = {key: options[key] for key in ("revision", "token", "cache_dir") if key in options}
    trust = {"trust_remote_code": options["trust_remote_code"]}
    config = AutoConfig.from_pretrained(name, **source, **trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **trust)
    if cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **source) is not None:
        model.generation_config = GenerationConfig.from_pretrained(name, **source)
    return model


def load_tokenizer(model: PreTrainedModel, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of the same name as the model, from the revision that the options name."""
    return AutoTokenizer.from_pretrained(
        model.config._name_or_path,
        revision=options.get("revision", "main"),
        trust_remote_code=options["trust_remote_code"],
        padding_side="left",
    )


def with_adapter(model: PreTrainedModel, peft_config: "PeftConfig", seed: int) -> "PeftModel":
    """
    The model with a new adapter.

    Raises:
        `ValueError`: If it has one already.
    """
    if is_peft_model(model):
        raise ValueError(
            "You passed a `PeftModel` together with a `peft_config`. Merge and unload the existing adapter first and "
            "pass the base model, or leave `peft_config` out to train the adapter that the model has."
        )
    return adapters.add_adapter(model, peft_config, seed)
