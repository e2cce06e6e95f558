"""vLLM in the trainer's processes: its weights are the working weights, whole or a part in each of a group."""

import re
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..config import ESConfig
from ..engines import LoRAAdapters, VLLMEngine
from ..run.processes import Processes
from .answers import Answers
from .base import Backend, trained
from .local import Local
from .results import Prompts


if TYPE_CHECKING:
    from ..weights.layouts import EngineWeights


logger = logging.get_logger(__name__)


class VLLM(Local):
    """Members are written into vLLM's weights, one at a time."""

    moves_model = False  # vLLM has the weights on the device
    engine: VLLMEngine

    def __init__(self, args: ESConfig, processes: Processes, answers: Answers, source: str | None):
        super().__init__(args, processes, answers, source)
        self.group_size = args.vllm_tensor_parallel_size

    def _make_engine(self, tokenizer: PreTrainedTokenizerBase) -> VLLMEngine:
        return VLLMEngine(self.model, tokenizer, self.args, self.source, self.processes)

    def _engine_weights(self) -> "dict[nn.Parameter, EngineWeights]":
        return self.engine.engine_weights()

    def _make_population_batch(self) -> None:
        return None

    def check(self, model: nn.Module) -> None:
        Backend.check(self, model)  # the model's modules compute nothing


class VLLMLoRA(VLLM):
    """Members are LoRA adapters. vLLM generates with many of them at the same time."""

    def start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().start(model, tokenizer)
        self._freeze_parameters_without_lora()

    def _freeze_parameters_without_lora(self) -> None:
        parameters = dict(trained(self.model))
        carried = self.engine.lora_target_parameters()
        others = {name: parameter for name, parameter in parameters.items() if name not in carried}
        if len(others) == len(parameters):
            raise ValueError(
                f"`vllm_lora=True`: adapters can carry none of the trained parameters ({', '.join(list(others)[:4])}, "
                "...). Set vllm_lora=False."
            )
        for parameter in others.values():
            parameter.requires_grad = False
        if others:
            logger.warning(
                f"`vllm_lora=True`: {len(others)} parameters that adapters cannot carry stay as they are: "
                f"{', '.join(dict.fromkeys(re.sub('[.][0-9]+[.]', '.*.', name) for name in others))}."
            )

    def _make_population_batch(self) -> LoRAAdapters:
        return LoRAAdapters(self.optimizer.weights)

    def _batch_sizes(self, prompts: Prompts) -> tuple[int, int | None]:
        return self.engine.max_loras, self.args.generation_batch_size
