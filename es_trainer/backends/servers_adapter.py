"""vLLM servers have the base model, and an adapter of PEFT's is trained in the trainer's process."""

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..config import ESConfig
from ..engines import VLLMAdapterServers
from .dispatched import Dispatched
from .trainer_inputs import TrainerInputs
from .vllm_adapter import VLLMAdapter, check_adapter


class ServersAdapter(Dispatched, VLLMAdapter):
    """
    Groups of members go to servers as those become free. The weights are where those of [`VLLMAdapter`] are.

    Servers are sent the unperturbed adapter after each step, and write members from their seeds.
    """

    engine_kind = VLLMAdapterServers
    engine: VLLMAdapterServers

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        check_adapter(args, inputs)
        super().check_arguments(args, inputs)

    def _make_engine(self, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> VLLMAdapterServers:
        return self.engine_kind(self.model, processing_class, self.args)

    def _make_population_batch(self) -> VLLMAdapterServers:
        self.engine.connect(self.optimizer.weights)
        return self.engine
