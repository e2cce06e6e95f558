"""Rollouts of several turns: tools that a model calls while it answers, and environments that it acts in."""

from .conversation import Conversation, ToolTemplate
from .environments import EnvironmentFactory, Environments, begin
from .toolbox import Toolbox


__all__ = ["Conversation", "EnvironmentFactory", "Environments", "ToolTemplate", "Toolbox", "begin"]
