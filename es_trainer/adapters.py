"""Adapters that a run makes, and that its replay makes again."""

from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed
from transformers import PreTrainedModel


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def add_adapter(model: PreTrainedModel, peft_config: "PeftConfig", seed: int) -> "PeftModel":
    """Wrap a model with an adapter, whose random initial weights follow from the seed."""
    # Imported where it is used: importing peft takes seconds
    from peft import get_peft_model

    set_seed(seed)
    return get_peft_model(model, peft_config)


def to_json(peft_config: "PeftConfig") -> dict[str, Any]:
    """The config as it is written into a history."""
    values = peft_config.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def from_json(values: dict[str, Any]) -> "PeftConfig":
    """The config that `to_json` wrote."""
    from peft import PeftConfig

    return PeftConfig.from_peft_type(**values)
