from .conciseness import conciseness
from .countdown import countdown
from .gsm8k import gsm8k
from .math import math
from .task import Task


__all__ = ["Task", "conciseness", "countdown", "gsm8k", "math"]
