"""Step lengths that are tried on held-out prompts."""

import math
from collections.abc import Callable

from ..evolution import EvolutionStrategy


# The first of those with the same reward is taken
LENGTHS = {"same": 1.0, "half": 0.5, "double": 2.0}
MOST = 16.0  # times the learning rate; the least is 1 / MOST of it


def choose_step_scale(optimizer: EvolutionStrategy, held_out_reward: Callable[[], float]) -> dict[str, float]:
    """
    Try the next step at 1/2, 1 and 2 times its length, and let this and the following ones have the best.

    Args:
        optimizer ([`EvolutionStrategy`]):
            It was told how the members did. Its `step_scale` is changed.
        held_out_reward (`Callable`):
            Evaluates the weights as they are.

    Returns:
        `dict[str, float]`: the held-out rewards, to be logged.
    """
    scale = optimizer.step_scale
    tried = {name: scale * length for name, length in LENGTHS.items() if 1 / MOST <= scale * length <= MOST}
    rewards = {}
    for name, length in tried.items():
        with optimizer.previewed(length):
            rewards[name] = held_out_reward()
    known = {name: reward for name, reward in rewards.items() if not math.isnan(reward)}
    if known:
        optimizer.step_scale = tried[max(known, key=known.get)]
    return {f"auto_step/{name}": reward for name, reward in rewards.items()}
