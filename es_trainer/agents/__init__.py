"""
Rollouts of several turns: tools that a model calls while it answers, environments that it acts in, and programs that
ask it for completions.
"""

from .conversation import Conversation, ToolTemplate
from .environments import EnvironmentFactory, Environments, begin
from .programs import AgentFunc, Program, Programs
from .results import reward_func
from .server import ModelServer, listen
from .session import Endpoint, Session
from .toolbox import Toolbox


__all__ = [
    "AgentFunc",
    "Conversation",
    "Endpoint",
    "EnvironmentFactory",
    "Environments",
    "ModelServer",
    "Program",
    "Programs",
    "Session",
    "ToolTemplate",
    "Toolbox",
    "begin",
    "listen",
    "reward_func",
]
