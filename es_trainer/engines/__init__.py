"""Engines, which generate completions for prompts: Transformers, vLLM in this process, vLLM servers."""

from ..rollout import Completion
from .base import Engine
from .population_batch import PopulationBatch, Rows
from .transformers_engine import TransformersEngine
from .vllm_dispatch import Job
from .vllm_engine import LoRAAdapters, VLLMEngine
from .vllm_server_engine import VLLMServerEngine
from .vllm_servers import Done, VLLMServers


__all__ = [
    "Completion",
    "Done",
    "Engine",
    "Job",
    "LoRAAdapters",
    "PopulationBatch",
    "Rows",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "VLLMServers",
]
