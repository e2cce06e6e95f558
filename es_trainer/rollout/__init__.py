"""Completions of members for prompts."""

from .transformers_engine import Completion, TransformersEngine


__all__ = ["Completion", "TransformersEngine"]
