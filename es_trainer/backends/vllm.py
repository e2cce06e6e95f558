"""vLLM in the trainer's processes: its weights are the working weights, whole or a part in each of a group."""

from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..config import ESConfig, launched_processes
from ..engines import VLLMEngine
from ..engines.vllm_version import check_version
from ..fields import require
from ..run.processes import Processes
from .answers import Answers
from .base import Backend, require_saved_state
from .local import Local
from .trainer_inputs import TrainerInputs
from .vllm_arguments import check_vllm_arguments


if TYPE_CHECKING:
    from ..weights.layouts import EngineWeights


class VLLM(Local):
    """Members are written into vLLM's weights, one at a time."""

    moves_model = False  # vLLM has the weights on the device
    engine_kind = VLLMEngine
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

    def _make_engine(self, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> VLLMEngine:
        return self.engine_kind(self.model, processing_class, self.args, self.source, self.processes)

    def _engine_weights(self) -> "dict[nn.Parameter, EngineWeights]":
        return self.engine.engine_weights(self.answers.image_prompt)

    def _evaluates_together(self) -> bool:
        return False

    def _make_population_batch(self) -> None:
        return None

    def check(self, model: nn.Module) -> None:
        Backend.check(self, model)  # the model's modules compute nothing
