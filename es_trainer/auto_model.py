"""Models by name, of the class that their config says."""

from typing import Any

from transformers import (
    CONFIG_NAME,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import cached_file


SOURCE = ("revision", "token", "cache_dir")  # arguments that say which files a name means


def source_of(options: dict[str, Any]) -> dict[str, Any]:
    """Those keyword arguments of `from_pretrained` that say which files a name means."""
    return {key: options[key] for key in SOURCE if key in options}


def has_file(name: str, file: str, options: dict[str, Any]) -> bool:
    """Whether a model's repository or folder has a file."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **source_of(options)) is not None


def auto_class(
    config: PreTrainedConfig, architecture: str | None = None
) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """
    What loads the model of a config: [`~transformers.AutoModelForImageTextToText`] where the model's architecture is
    one of its classes, or code of the model's own is made for it; [`~transformers.AutoModelForCausalLM`] otherwise.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The config.
        architecture (`str`, *optional*):
            Name of the model's class. If `None`, the config says it.
    """
    own_code = getattr(config, "auto_map", None) or {}
    if AutoModelForImageTextToText.__name__ in own_code:
        return AutoModelForImageTextToText
    architecture = architecture or (config.architectures or [None])[0]
    known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    return AutoModelForImageTextToText if known is not None and known == architecture else AutoModelForCausalLM


def from_pretrained(name: str, **options: Any) -> PreTrainedModel:
    """
    A model by its name or folder, or the one that a PEFT adapter names.

    Args:
        name (`str`):
            Name or folder.
        options:
            Keyword arguments of the auto class's `from_pretrained`.
    """
    kind = AutoModelForCausalLM
    if has_file(name, CONFIG_NAME, options):  # or it is an adapter
        trust = {"trust_remote_code": options.get("trust_remote_code", False)}
        kind = auto_class(AutoConfig.from_pretrained(name, **source_of(options), **trust))
    return kind.from_pretrained(name, **options)
