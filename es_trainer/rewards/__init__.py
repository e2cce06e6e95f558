from .accuracy import accuracy_reward
from .conciseness import conciseness_reward
from .count import count_reward
from .countdown import countdown_reward, solves
from .evaluate_metric import evaluate_reward
from .scope import per_member, time_limit
from .text import completion_text


__all__ = [
    "accuracy_reward",
    "completion_text",
    "conciseness_reward",
    "count_reward",
    "countdown_reward",
    "evaluate_reward",
    "per_member",
    "solves",
    "time_limit",
]
