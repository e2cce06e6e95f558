from .arc import arc
from .conciseness import conciseness
from .count_shapes import count_shapes
from .countdown import countdown
from .gsm8k import gsm8k
from .math import math
from .reasoning_gym import reasoning_gym
from .sudoku import sudoku
from .task import Task


__all__ = ["Task", "arc", "conciseness", "count_shapes", "countdown", "gsm8k", "math", "reasoning_gym", "sudoku"]
