"""vLLM in the trainer's processes has the base model, and an adapter of PEFT's is trained."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..config import ESConfig
from ..engines import AdapterMembers, VLLMAdapterEngine, lora_layers
from ..engines.vllm_engine import LOADABLE
from ..fields import require
from .base import trained
from .low_rank_adapters import MOST_RANK
from .results import Prompts
from .trainer_inputs import TrainerInputs
from .vllm import VLLM


if TYPE_CHECKING:
    from peft import PeftConfig

# What vLLM's slots cannot hold, or what needs the weights of the base model, by fields of `LoraConfig`
REFUSED = {
    "use_dora": "magnitudes of weights",
    "modules_to_save": "whole modules",
    "trainable_token_indices": "embeddings of tokens",
    "target_parameters": "parameters that are no linear layers",
    "lora_bias": "biases",
    "layer_replication": "other layers than the base model's",
    "alora_invocation_tokens": "adapters for a part of a text",
    "use_qalora": "inputs that are pooled",
    "use_bdlora": "matrices of blocks",
    "arrow_config": "several adapters at once",
    "kasa_config": "singular values of weights",
    "monteclora_config": "several samples of an adapter",
    "velora_config": "other forward passes",
}
INITIAL = (True, False, "gaussian", "orthogonal")  # `init_lora_weights` that leave the base model's weights alone


class VLLMAdapter(VLLM):
    """
    Members are the adapter with noise, in vLLM's slots: many are evaluated at the same time.

    vLLM loads the base model by its name, whose weights, which may be quantized, are in none of the trainer's tensors.
    Each process has the whole adapter.
    """

    loads_weights = False
    engine_kind = VLLMAdapterEngine
    engine: VLLMAdapterEngine
    no_images = "vLLM is not given images with `peft_config`. Leave `use_vllm` out"

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        check_adapter(args, inputs)
        others = sorted((args.model_init_kwargs or {}).keys() - LOADABLE)
        require(
            args,
            not others,
            "model_init_kwargs",
            f"vLLM loads the base model, with {', '.join(sorted(LOADABLE))} only; leave out {', '.join(others)}.",
        )
        super().check_arguments(args, inputs)

    @property
    def parts(self) -> int:
        return 1

    def start(self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
        self.model = model
        for _, parameter in trained(model):
            parameter.data = parameter.data.to(self.args.device)
        self.processes.broadcast([parameter.data for _, parameter in trained(model)], self.args.device)
        self.engine = self._make_engine(processing_class)
        self.slots = self.engine.slots()

    def _engine_weights(self) -> None:
        return None

    def _frozen(self, dtype: torch.dtype | None) -> list[torch.Tensor]:
        return []  # vLLM has the rest of the model

    def _make_population_batch(self) -> VLLMAdapterEngine:
        self.engine.members = AdapterMembers(self.optimizer.weights, lora_layers(self.model), self.slots)
        return self.engine

    def _batch_sizes(self, prompts: Prompts) -> tuple[int, int | None]:
        return self.engine.most_members, self.args.generation_batch_size


def check_adapter(args: ESConfig, inputs: TrainerInputs) -> None:
    """
    Raises:
        `ValueError`: If vLLM cannot have the base model, or its slots cannot hold the adapter.
    """
    require(args, not args.vllm_lora, "vllm_lora", "with `peft_config`, members are adapters already; leave it out.")
    if inputs.peft_config is None or inputs.source is None:
        raise ValueError(
            f"`model` is a {type(inputs.model).__name__}, but with `use_vllm=True` and an adapter, vLLM loads the "
            "base model by its name: give `model` by name or folder, and a `peft_config`."
        )
    check_lora_config(inputs.peft_config)


def check_lora_config(peft_config: "PeftConfig") -> None:
    """
    Raises:
        `ValueError`: If vLLM's slots cannot hold the adapter; names the field.
    """
    # Imported where it is used: importing peft takes seconds
    from peft import LoraConfig

    if type(peft_config) is not LoraConfig:
        raise ValueError(
            f"`peft_config` is a {type(peft_config).__name__}, but vLLM has adapters of `LoraConfig` only. Use one, "
            "or set use_vllm=False."
        )
    for name, what in REFUSED.items():
        _require(peft_config, name, not getattr(peft_config, name), f"vLLM's adapters cannot hold {what}")
    _require(peft_config, "bias", peft_config.bias == "none", "vLLM's adapters cannot hold biases")
    _require(
        peft_config,
        "init_lora_weights",
        any(peft_config.init_lora_weights is each or peft_config.init_lora_weights == each for each in INITIAL),
        f"it needs the weights of the base model, which vLLM has. Choose one of {', '.join(map(repr, INITIAL))}",
    )
    rank = max([peft_config.r, *peft_config.rank_pattern.values()])
    _require(peft_config, "r", rank <= MOST_RANK, f"vLLM's adapters have a rank of at most {MOST_RANK}")


def _require(peft_config: "PeftConfig", name: str, condition: Any, problem: str) -> None:
    if not condition:
        raise ValueError(
            f"`peft_config` has `{name}={getattr(peft_config, name)!r}`, which `use_vllm=True` does not support: "
            f"{problem}. Change it, or set use_vllm=False."
        )
