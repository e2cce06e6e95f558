"""vLLM in the trainer's processes: its weights are the working weights, whole or a part in each of a group."""

import re
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..config import ESConfig, launched_processes
from ..engines import LoRAAdapters, VLLMEngine
from ..engines.vllm_version import check_version
from ..fields import require
from ..run.processes import Processes
from .answers import Answers
from .base import Backend, require_saved_state, trained
from .local import Local
from .results import Prompts
from .trainer_inputs import TrainerInputs
from .vllm_arguments import check_vllm_arguments


if TYPE_CHECKING:
    from ..weights.layouts import EngineWeights


logger = logging.get_logger(__name__)

MOST_RANK = 512  # of vLLM's adapters


class VLLM(Local):
    """Members are written into vLLM's weights, one at a time."""

    moves_model = False  # vLLM has the weights on the device
    no_images = "vLLM is not given images. Leave `use_vllm` out"
    engine: VLLMEngine

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        require(
            args,
            args.vllm_model_impl in ("vllm", "transformers"),
            "vllm_model_impl",
            "choose one of 'vllm', 'transformers'.",
        )
        require(
            args, 0 < args.vllm_gpu_memory_utilization <= 1, "vllm_gpu_memory_utilization", "it must be in (0, 1]."
        )
        require(
            args,
            args.vllm_max_model_length is None or args.vllm_max_model_length >= 1,
            "vllm_max_model_length",
            "it must be at least 1, or None for the model's.",
        )
        require(
            args,
            args.vllm_tensor_parallel_size >= 1 and launched_processes() % args.vllm_tensor_parallel_size == 0,
            "vllm_tensor_parallel_size",
            f"it must divide the number of processes, which is {launched_processes()}.",
        )
        require(
            args,
            not args.vllm_enable_sleep_mode or args.device.type != "cpu",
            "vllm_enable_sleep_mode",
            "vLLM has no sleep mode on CPU; set it to False.",
        )
        check_vllm_arguments(args, inputs)
        if args.vllm_tensor_parallel_size > 1:
            require_saved_state(args)
            if inputs.runs_code:
                raise ValueError(
                    "`tools`, `environment_factory`, `rollout_func` and `agent_func` with `vllm_tensor_parallel_size="
                    f"{args.vllm_tensor_parallel_size}`: each process of a group would run them. Leave "
                    "`vllm_tensor_parallel_size` out."
                )
        check_version()

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

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        require(
            args, args.perturbation == "low_rank", "vllm_lora", "adapters are low-rank; set perturbation='low_rank'."
        )
        require(
            args,
            args.perturbation_rank <= MOST_RANK,
            "perturbation_rank",
            f"vLLM's adapters have a rank of at most {MOST_RANK}.",
        )
        super().check_arguments(args, inputs)

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
