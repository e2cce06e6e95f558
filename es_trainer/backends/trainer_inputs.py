"""What a trainer is given beside its config, as far as a mode may refuse it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from accelerate.utils import is_peft_model
from torch import nn

from ..agents import AgentFunc, Environments
from ..agents import reward_func as agent_reward
from ..config import ESConfig
from ..data import with_prompts
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
        agent_func (`Callable`, *optional*):
            Program that asks the model for completions.
    """

    model: str | nn.Module
    quantization_config: Any = None
    peft_config: Any = None
    rollout_func: RolloutFunc | None = None
    tools: Sequence[Callable] = ()
    environments: Environments | None = None
    agent_func: AgentFunc | None = None

    @property
    def source(self) -> str | None:
        """Name or folder of the model, if it was given by that."""
        return self.model if isinstance(self.model, str) else None

    @property
    def has_turns(self) -> bool:
        """Whether the model calls tools, so that its answers take several turns."""
        return bool(self.tools) or self.environments is not None

    @property
    def runs_code(self) -> bool:
        """Whether code of the user takes part in the rollouts."""
        return self.has_turns or self.rollout_func is not None or self.agent_func is not None

    @property
    def own_rewards(self) -> list[Callable]:
        """Reward functions beside those of the trainer's `reward_funcs`."""
        if self.agent_func is not None:
            return [agent_reward(self.agent_func)]
        return self.environments.reward_funcs() if self.environments is not None else []

    def train_dataset(self, args: ESConfig, train_dataset: Any) -> Any:
        """The dataset to train on, which environments may make."""
        if self.environments is not None and train_dataset is None:
            return self.environments.dataset(args)
        return self.with_prompts(train_dataset)

    def with_prompts(self, dataset: Any) -> Any:
        """A dataset with prompts, where its rows need none."""
        return with_prompts(dataset) if self.agent_func is not None else dataset

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained."""
        return self.peft_config is not None or (isinstance(self.model, nn.Module) and is_peft_model(self.model))
