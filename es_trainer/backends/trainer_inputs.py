"""What a trainer is given beside its config, as far as a mode may refuse it."""

from typing import Any, NamedTuple

from accelerate.utils import is_peft_model
from torch import nn

from .rollout_func import RolloutFunc


class TrainerInputs(NamedTuple):
    """
    Arguments of a trainer.

    Args:
        model (`str` or `nn.Module`):
            The model, or its name or folder.
        quantization_config (`Any`, *optional*):
            How the model is quantized when it is loaded.
        peft_config (`Any`, *optional*):
            The adapter that it gets.
        rollout_func (`Callable`, *optional*):
            Function that generates the completions.
    """

    model: str | nn.Module
    quantization_config: Any = None
    peft_config: Any = None
    rollout_func: RolloutFunc | None = None

    @property
    def source(self) -> str | None:
        """Name or folder of the model, if it was given by that."""
        return self.model if isinstance(self.model, str) else None

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained."""
        return self.peft_config is not None or (isinstance(self.model, nn.Module) and is_peft_model(self.model))
