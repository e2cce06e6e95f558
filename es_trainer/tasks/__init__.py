from .conciseness import conciseness
from .countdown import countdown
from .task import Task


__all__ = ["Task", "conciseness", "countdown"]
