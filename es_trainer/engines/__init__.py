"""Completions of members for prompts."""

from ..rollout import Completion
from .base import Engine
from .population_batch import PopulationBatch, Rows
from .transformers_engine import TransformersEngine
from .vllm_engine import Adapters, VLLMEngine
from .vllm_server import VLLMServers


__all__ = [
    "Adapters",
    "Completion",
    "Engine",
    "PopulationBatch",
    "Rows",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServers",
]
