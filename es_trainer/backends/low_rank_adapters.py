"""Members as low-rank adapters of vLLM, wherever it runs."""

import re
from collections.abc import Container

from torch import nn
from transformers.utils import logging

from ..config import ESConfig
from ..fields import require
from .base import trained


logger = logging.get_logger(__name__)

MOST_RANK = 512  # of vLLM's adapters


def check_low_rank(args: ESConfig) -> None:
    """
    Raises:
        `ValueError`: If members are no low-rank adapters.
    """
    require(args, args.perturbation == "low_rank", "vllm_lora", "adapters are low-rank; set perturbation='low_rank'.")
    require(
        args,
        args.perturbation_rank <= MOST_RANK,
        "perturbation_rank",
        f"vLLM's adapters have a rank of at most {MOST_RANK}.",
    )


def freeze_parameters_without_slots(model: nn.Module, names: Container[str]) -> None:
    """
    Leave those parameters alone that vLLM has no adapter slots for, with a warning.

    Args:
        model (`nn.Module`):
            The model.
        names (`Container[str]`):
            Names of the parameters with slots.

    Raises:
        `ValueError`: If there are none.
    """
    parameters = dict(trained(model))
    others = {name: parameter for name, parameter in parameters.items() if name not in names}
    if len(others) == len(parameters):
        raise ValueError(
            f"`vllm_lora=True`: adapters can carry none of the trained parameters ({', '.join(list(others)[:4])}, "
            "...). Set vllm_lora=False."
        )
    for parameter in others.values():
        parameter.requires_grad = False
    if others:
        logger.warning(
            f"`vllm_lora=True`: {len(others)} parameters that adapters cannot carry stay as they are: "
            f"{', '.join(dict.fromkeys(re.sub('[.][0-9]+[.]', '.*.', name) for name in others))}."
        )
