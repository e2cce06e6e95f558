"""Completions of members for prompts."""

from .population_batch import PopulationBatch, Rows
from .transformers_engine import Completion, TransformersEngine


__all__ = ["Completion", "PopulationBatch", "Rows", "TransformersEngine"]
