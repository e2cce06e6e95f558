"""Models, tokenizers, processors and adapters by what names them."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import GENERATION_CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from . import adapters, auto_model
from .checks import check_model
from .config import ESConfig
from .data import has_images, image_columns
from .engines.vocabulary import check_special_tokens, require_pad_token, tokenizer_of
from .saving import make_savable
from .text_only import freeze_other_modalities


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


def load(
    model: "str | PreTrainedModel | PeftModel",
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    args: ESConfig,
    quantization_config: "BitsAndBytesConfig | None",
    peft_config: "PeftConfig | None",
    with_weights: bool,
    datasets: dict[str, Any],
) -> "tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase | ProcessorMixin]":
    """
    The model and the tokenizer or processor of a run, loaded if they are given by name, and made ready for training.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model, or its name or folder.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer, or processor of a model that reads more than texts. If `None`, it is loaded by the model's name.
        args ([`ESConfig`]):
            The config.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model that is loaded.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to add.
        with_weights (`bool`):
            Whether this process needs the weights of a model that is loaded.
        datasets (`dict[str, Any]`):
            Datasets by name. What those to train on have no part in is frozen.

    Raises:
        `TypeError` or `ValueError`: If it cannot be trained.
    """
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if isinstance(model, str):
        model = load_model(model, options, quantization_config, with_weights)
        check_model(model, processing_class)
    if processing_class is None:
        processing_class = load_processing_class(model.config._name_or_path, options)
    tokenizer = tokenizer_of(processing_class)
    require_pad_token(tokenizer)
    check_special_tokens(model, tokenizer)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if processing_class is tokenizer:
        _check_no_images(model, datasets)
    if peft_config is not None:
        model = with_adapter(model, peft_config, args.seed)
    make_savable(model)
    if processing_class is tokenizer or not has_images(datasets["train_dataset"]):
        freeze_other_modalities(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "All parameters of the model are frozen (requires_grad=False), so there is nothing to train. Set "
            "requires_grad=True on those to train."
        )
    return model, processing_class


def _check_no_images(model: PreTrainedModel, datasets: dict[str, Any]) -> None:
    for name, dataset in datasets.items():
        columns = image_columns(dataset)
        if columns:
            raise ValueError(
                f"`{name}` has the column {columns[0]!r}, but `processing_class` is a tokenizer, so that the model, a "
                f"{type(model).__name__}, would not see images. Give a model that reads them and its processor "
                "(`AutoProcessor`), or, to train on the text alone, dataset.remove_columns"
                f"({columns!r})."
            )


def load_model(
    name: str, options: dict[str, Any], quantization_config: "BitsAndBytesConfig | None", with_weights: bool
) -> PreTrainedModel:
    """A model by its name or folder, in float32 unless `dtype` is among the options."""
    if not with_weights:
        return _without_weights(name, options)
    if quantization_config is not None:
        options = {**options, "quantization_config": quantization_config}
    return auto_model.from_pretrained(name, **{"dtype": torch.float32, **options})


def _without_weights(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """A model on the meta device, for which no weights are read or downloaded."""
    source = auto_model.source_of(options)
    trust = {"trust_remote_code": options["trust_remote_code"]}
    config = AutoConfig.from_pretrained(name, **source, **trust)
    with torch.device("meta"):
        model = auto_model.auto_class(config).from_config(config, **trust)
    if auto_model.has_file(name, GENERATION_CONFIG_NAME, options):
        model.generation_config = GenerationConfig.from_pretrained(name, **source)
    return model


def load_processing_class(name: str, options: dict[str, Any]) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The processor of a model by its name or folder, or its tokenizer if there is none."""
    has_processor = any(auto_model.has_file(name, file, options) for file in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME))
    return (AutoProcessor if has_processor else AutoTokenizer).from_pretrained(
        name,
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
