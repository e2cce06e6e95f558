"""A number that proves that two processes, or two runs, have the same weights."""

import torch

from ..noise import noise
from .part import Part


# Odd, and without a pattern: the 64 bits of the golden ratio, and a multiplier of SplitMix64
MULTIPLIER_0, MULTIPLIER_1 = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: torch.Tensor, start: int = 0) -> int:
    """
    A 64-bit number that another one takes the place of if a bit or the order of the values is another.

    It is the sum, modulo 2**64, of the values' bits times odd multipliers that are hashes of their indices. So the
    checksums of a tensor's slices add up to its own, and neither the size of pieces nor the device count.

    Args:
        values (`torch.Tensor`):
            Flat tensor.
        start (`int`, *optional*, defaults to `0`):
            Flat index of the first of them.
    """

    def piece(low: int, high: int) -> int:
        index = torch.arange(start + low, start + high, dtype=torch.int64, device=values.device)
        index.mul_(MULTIPLIER_0)
        index.bitwise_xor_(index >> 32).mul_(MULTIPLIER_1).bitwise_or_(1)
        return index.mul_(values[low:high].view(BITS[values.itemsize])).sum().item()

    return sum(noise.for_pieces(piece, values.numel(), values.device)) % (1 << 64)


def checksum_of_part(part: Part, values: torch.Tensor) -> int:
    """The checksum of a part's weights. Those of a part in several runs are counted from 0 on, without the gaps."""
    return checksum(values, part.offset if part.is_contiguous else 0)
