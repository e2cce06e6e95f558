"""Completions of members for prompts."""

from .population_batch import PopulationBatch, Rows
from .rollout_func import RolloutFunc, call_rollout_func
from .transformers_engine import Completion, TransformersEngine


__all__ = ["Completion", "PopulationBatch", "RolloutFunc", "Rows", "TransformersEngine", "call_rollout_func"]
