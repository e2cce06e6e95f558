"""vLLM in the trainer's processes, with members as LoRA adapters."""

import re

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..config import ESConfig
from ..engines import LowRankMembers, MemberRequests, VLLMLoRAEngine
from ..fields import require
from .base import trained
from .results import Prompts
from .trainer_inputs import TrainerInputs
from .vllm import VLLM


logger = logging.get_logger(__name__)

MOST_RANK = 512  # of vLLM's adapters


class VLLMLoRA(VLLM):
    """Members are LoRA adapters. vLLM generates with many of them at the same time."""

    engine: VLLMLoRAEngine

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

    def _make_engine(self, tokenizer: PreTrainedTokenizerBase) -> VLLMLoRAEngine:
        return VLLMLoRAEngine(self.model, tokenizer, self.args, self.source, self.processes)

    def start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().start(model, tokenizer)
        self.slots = self.engine.slots()
        self._freeze_parameters_without_slots()

    def _freeze_parameters_without_slots(self) -> None:
        parameters = dict(trained(self.model))
        others = {name: parameter for name, parameter in parameters.items() if name not in self.slots}
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

    def _make_population_batch(self) -> MemberRequests:
        return MemberRequests(LowRankMembers(self.optimizer.weights, self.slots))

    def _batch_sizes(self, prompts: Prompts) -> tuple[int, int | None]:
        return self.engine.most_members, self.args.generation_batch_size
