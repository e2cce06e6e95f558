"""Completions of members for prompts."""

from .engine import Completion, Engine
from .population_batch import PopulationBatch, Rows
from .rollout_func import RolloutFunc, call_rollout_func
from .transformers_engine import TransformersEngine


__all__ = ["Completion", "Engine", "PopulationBatch", "RolloutFunc", "Rows", "TransformersEngine", "call_rollout_func"]
