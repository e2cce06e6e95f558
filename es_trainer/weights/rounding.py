"""Perturbed weights, written from the unperturbed ones and rounded once to the working dtype."""

import torch

from ..noise import noise
from ..noise.shapes import Sum
from .shard import Shard


def write_rounded(shard: Shard, target: torch.Tensor, perturbation: Sum, rounding: int | None) -> None:
    """
    Write a shard's weights with a perturbation into a flat tensor on the device of the working weights.

    Args:
        shard ([`Shard`]):
            The unperturbed weights.
        target (`torch.Tensor`):
            Where the perturbed ones go.
        perturbation ([`Sum`]):
            What to add; its indices count from the start of the shard on.
        rounding (`int`, *optional*):
            Key of a stochastic rounding: in 16 bits, nearly all of a perturbation that is smaller than the weights'
            last bit would be lost if it was rounded to nearest. Up or down at random, the mean is right. `None` rounds
            to nearest.
    """
    if shard.trained.device == target.device:
        perturbation.add(shard.trained, target, rounding=rounding)
    else:
        write_from_host(shard.master, target, perturbation, rounding)


def write_from_host(master: torch.Tensor, target: torch.Tensor, perturbation: Sum, rounding: int | None) -> None:
    """The same from a master in host memory, of which pieces go to the device one after another."""

    def piece(low: int, high: int) -> None:
        source = master[low:high].to(target.device, non_blocking=True)
        perturbation.add(source, target[low:high], low, rounding)

    noise.for_pieces(piece, target.numel(), target.device)
