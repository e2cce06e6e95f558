"""vLLM servers with members as LoRA adapters: each server answers for a group of members in one batch."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..config import ESConfig
from ..engines import VLLMLoRAServers
from .low_rank_adapters import check_low_rank, freeze_parameters_without_slots
from .servers import Servers
from .trainer_inputs import TrainerInputs


class ServersLoRA(Servers):
    """Groups of members go to servers as those become free."""

    engine_kind = VLLMLoRAServers
    engine: VLLMLoRAServers

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        check_low_rank(args)
        super().check_arguments(args, inputs)

    def start(self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
        super().start(model, processing_class)
        freeze_parameters_without_slots(model, self.engine.open_slots())
