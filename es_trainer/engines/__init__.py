"""Engines, which generate completions for prompts: Transformers, vLLM in this process, vLLM servers."""

from ..rollout import Completion
from .base import Engine
from .peft_members import AdapterMembers, lora_layers
from .population_batch import PopulationBatch, Rows
from .transformers_engine import TransformersEngine
from .vllm_adapter_engine import VLLMAdapterEngine
from .vllm_adapter_servers import VLLMAdapterServerEngine, VLLMAdapterServers
from .vllm_dispatch import Job
from .vllm_engine import VLLMEngine
from .vllm_lora_engine import VLLMLoRAEngine
from .vllm_lora_servers import VLLMLoRAServerEngine, VLLMLoRAServers
from .vllm_server_engine import VLLMServerEngine
from .vllm_servers import Done, VLLMServers
from .vllm_slots import LowRankMembers


__all__ = [
    "AdapterMembers",
    "Completion",
    "Done",
    "Engine",
    "Job",
    "LowRankMembers",
    "PopulationBatch",
    "Rows",
    "TransformersEngine",
    "VLLMAdapterEngine",
    "VLLMAdapterServerEngine",
    "VLLMAdapterServers",
    "VLLMEngine",
    "VLLMLoRAEngine",
    "VLLMLoRAServerEngine",
    "VLLMLoRAServers",
    "VLLMServerEngine",
    "VLLMServers",
    "lora_layers",
]
