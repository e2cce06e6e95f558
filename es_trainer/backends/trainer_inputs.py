"""What a trainer is given beside its config, as far as a mode may refuse it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from accelerate.utils import is_peft_model
from torch import nn

from ..agents import Environments
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
        tools (`list[Callable]`, *optional*):
            Functions that the model may call.
        environments ([`Environments`], *optional*):
            What it acts in.
    """

    model: str | nn.Module
    quantization_config: Any = None
    peft_config: Any = None
    rollout_func: RolloutFunc | None = None
    tools: Sequence[Callable] = ()
    environments: Environments | None = None

    @property
    def source(self) -> str | None:
        """Name or folder of the model, if it was given by that."""
        return self.model if isinstance(self.model, str) else None

    @property
    def has_turns(self) -> bool:
        """Whether the model calls tools, so that its answers take several turns."""
        return bool(self.tools) or self.environments is not None

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained."""
        return self.peft_config is not None or (isinstance(self.model, nn.Module) and is_peft_model(self.model))
