"""Completions of members for prompts."""

from .engine import Completion, Engine
from .population_batch import PopulationBatch, Rows
from .rollout_func import RolloutFunc, call_rollout_func
from .transformers_engine import TransformersEngine
from .vllm_engine import Adapters, VLLMEngine
from .vllm_server import VLLMServers


__all__ = [
    "Adapters",
    "Completion",
    "Engine",
    "PopulationBatch",
    "RolloutFunc",
    "Rows",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServers",
    "call_rollout_func",
]
