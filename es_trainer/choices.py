"""The values that settings can have."""

from typing import Literal


PerturbationName = Literal["gaussian", "low_rank"]
FitnessShaping = Literal["z_score", "centered_rank", "prompt_z_score", "prompt_centered", "none"]
MasterWeights = Literal["device", "host", "none"]
Rule = Literal["sgd", "momentum", "adam"]
