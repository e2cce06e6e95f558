"""The values that settings can have."""

import re
from typing import Literal


PerturbationName = Literal["gaussian", "low_rank"]
FitnessShaping = Literal["z_score", "centered_rank", "prompt_z_score", "prompt_centered", "none"]
MasterWeights = Literal["device", "host", "none"]
WeightQuantization = Literal["int8", "fp8"]
Rule = Literal["sgd", "momentum", "adam"]
AnchorWeights = Literal["device", "host", "model"]
AnchorPenalty = Literal["l2", "l1"]
SigmaSchedule = Literal["constant", "linear", "cosine"]
LogFormat = Literal["line", "dict"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]

# A multiple of sigma, such as "sigma/2" or "0.5 * sigma"
NUMBER = r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)"
OF_SIGMA = re.compile(rf"(?:{NUMBER}\s*\*\s*)?sigma(?:\s*([*/])\s*{NUMBER})?", re.IGNORECASE)

PASS_AT = re.compile(r"pass@([1-9][0-9]*)")


def is_generation_reward(name: str) -> bool:
    """Whether this is how completions can make the reward of their prompt: by name, or `"pass@k"`."""
    return name in ("mean", "max", "majority") or PASS_AT.fullmatch(name) is not None


def completions_needed(generation_reward: str) -> int:
    """How many completions of a prompt there have to be at least: k of `"pass@k"`."""
    found = PASS_AT.fullmatch(generation_reward)
    return int(found[1]) if found else 1


def shaping_problem(shaping: str, members_per_prompt: int | None) -> str | None:
    """Why members cannot be compared so, if so many of them have the same prompts (`None`: all)."""
    if members_per_prompt is None or not shaping.startswith("prompt_"):
        return None
    if shaping == "prompt_z_score":
        return "it compares all members on each prompt, but they have prompts of their own; take 'z_score'."
    if members_per_prompt == 1:
        return "it compares members on each prompt, but no two have the same; take 'z_score', or antithetic=True."
    return None
