"""Engines, which generate completions for prompts: Transformers, vLLM in this process, vLLM servers."""

from ..rollout import Completion
from .base import Engine
from .population_batch import PopulationBatch, Rows
from .transformers_engine import TransformersEngine
from .vllm_engine import VLLMEngine
from .vllm_lora_engine import MemberRequests, VLLMLoRAEngine
from .vllm_lora_servers import VLLMLoRAServers
from .vllm_server_engine import VLLMServerEngine
from .vllm_servers import VLLMServers
from .vllm_slots import LowRankMembers


__all__ = [
    "Completion",
    "Engine",
    "LowRankMembers",
    "MemberRequests",
    "PopulationBatch",
    "Rows",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMLoRAEngine",
    "VLLMLoRAServers",
    "VLLMServerEngine",
    "VLLMServers",
]
