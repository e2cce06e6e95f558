"""vLLM servers, which hold, perturb and update the weights. The trainer's process has none."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..config import ESConfig
from ..engines import VLLMServers
from ..engines.vllm_prompts import has_processor
from ..evolution import EvolutionStrategy
from ..fields import require
from ..text_only import freeze, other_modalities
from .base import require_saved_state, trained
from .dispatched import Dispatched
from .trainer_inputs import TrainerInputs


class Servers(Dispatched):
    """All weights are on the servers."""

    loads_weights = False
    engine_kind = VLLMServers

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        require(
            args,
            args.master_weights != "none",
            "master_weights",
            "members that a server evaluates would leave their rounding errors in its weights only; use 'device' or "
            "'host'.",
        )
        require_saved_state(args)
        super().check_arguments(args, inputs)
        if inputs.source is None:
            raise TypeError(
                f"`model` is a {type(inputs.model).__name__}, but the weights are on the servers with "
                "`vllm_mode='server'`: give the name or folder that the servers were started with."
            )

    @property
    def has_whole_weights(self) -> bool:
        return False

    def start(self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
        self.model = model
        self.engine = self.engine_kind(model, processing_class, self.args)

    def begin(self, decayed: set[str]) -> EvolutionStrategy:
        if self.answers.image_prompt is not None:
            self._check_processor()
            freeze(
                self.model,
                other_modalities(self.model),
                "servers keep what they make of an image for all members. To train them, too, set "
                "vllm_mode='colocate'",
            )
        self.optimizer = self.engine.begin(trained(self.model), decayed)
        return self.optimizer

    def _check_processor(self) -> None:
        if not has_processor(self.source, self.engine.images.processor, self.args):
            raise ValueError(
                f"`processing_class` is another processor than that of the model's files ({self.source}), with which "
                "servers process images. Save the model and this processor in a folder, and give that to the servers "
                "and as `model`; or set vllm_mode='colocate'."
            )

    def start_checksum(self) -> None:
        return None

    def resume(self, update_records: list[dict[str, Any]]) -> None:
        self.engine.replicas.update_records = update_records

    def collect(self) -> dict[torch.Tensor, torch.Tensor]:
        return self.engine.collect()
