"""What kernels write: one tensor each, of which a GPU writes many in one launch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Addition(NamedTuple):
    """
    `target = source + sum_k coefficients[k] * noise(seeds[k])`.

    Args:
        source (`torch.Tensor` or `None`):
            Flat tensor of the target's shape and device, or `None` for zeros. May be the target itself.
        target (`torch.Tensor`):
            Flat float32, bfloat16 or float16 tensor. The sum is computed in float32 and rounded once.
        stream (`int`):
            64-bit hash of the parameter's name.
        seeds (`Sequence[int]`):
            At least one seed, each in `[0, 2**63)`.
        coefficients (`Sequence[float]`):
            One number for each seed; rounded to float32.
        start (`int`, *optional*, defaults to `0`):
            Flat index of the target's first element in the whole parameter.
        rounding (`int`, *optional*):
            Key of a stochastic rounding to bfloat16 or float16: up with the probability that makes the mean the sum
            itself. `None` rounds to nearest.
    """

    source: torch.Tensor | None
    target: torch.Tensor
    stream: int
    seeds: Sequence[int]
    coefficients: Sequence[float]
    start: int = 0
    rounding: int | None = None


class Product(NamedTuple):
    """
    `target = source + left @ right` at flat indices from `start` on.

    Args:
        source (`torch.Tensor` or `None`), target (`torch.Tensor`):
            As of [`Addition`].
        left (`torch.Tensor` of shape `(matrices, rows, terms)`):
            Contiguous float32 tensor.
        right (`torch.Tensor` of shape `(matrices, terms, columns)`):
            Contiguous float32 tensor.
        start (`int`, *optional*, defaults to `0`), rounding (`int`, *optional*):
            As of [`Addition`].
    """

    source: torch.Tensor | None
    target: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    start: int = 0
    rounding: int | None = None
