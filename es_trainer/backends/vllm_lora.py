"""vLLM in the trainer's processes, with members as LoRA adapters."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..config import ESConfig
from ..engines import LowRankMembers, VLLMLoRAEngine
from .low_rank_adapters import check_low_rank, freeze_parameters_without_slots
from .results import Prompts
from .trainer_inputs import TrainerInputs
from .vllm import VLLM


class VLLMLoRA(VLLM):
    """Members are LoRA adapters. vLLM generates with many of them at the same time."""

    engine_kind = VLLMLoRAEngine
    engine: VLLMLoRAEngine

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        check_low_rank(args)
        super().check_arguments(args, inputs)

    def start(self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
        super().start(model, processing_class)
        self.slots = self.engine.slots()
        freeze_parameters_without_slots(model, self.slots)

    def _evaluates_together(self) -> bool:
        return True

    def _make_population_batch(self) -> VLLMLoRAEngine:
        self.engine.members = LowRankMembers(self.optimizer.weights, self.slots)
        return self.engine

    def _batch_sizes(self, prompts: Prompts) -> tuple[int, int | None]:
        return self.engine.most_members, self.args.generation_batch_size
