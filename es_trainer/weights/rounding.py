"""Perturbed weights, written from the unperturbed ones and rounded once to the working dtype."""

from collections.abc import Iterable

import torch

from ..noise import noise
from ..noise.shapes import Sum, Write, add_each
from .shard import Shard


def write_rounded(writes: Iterable[tuple[Shard, torch.Tensor, Sum, int | None]]) -> None:
    """
    Write weights of several shards with a perturbation, each into a flat tensor on the device of the working weights.

    Args:
        writes (`Iterable[tuple[Shard, torch.Tensor, Sum, int | None]]`):
            For each, the unperturbed weights; where the perturbed ones go; what to add, whose indices count from the
            start of the shard on; and the key of a stochastic rounding. In 16 bits, nearly all of a perturbation that
            is smaller than the weights' last bit would be lost if it was rounded to nearest. Up or down at random, the
            mean is right. `None` rounds to nearest.
    """
    here = []
    for shard, target, perturbation, rounding in writes:
        if shard.trained.device == target.device:
            here.append(Write(perturbation, shard.trained, target, rounding=rounding))
        else:
            write_from_host(shard.master, target, perturbation, rounding)
    add_each(here)


def write_from_host(master: torch.Tensor, target: torch.Tensor, perturbation: Sum, rounding: int | None) -> None:
    """The same for one shard with a master in host memory, of which pieces go to the device one after another."""

    def piece(low: int, high: int) -> None:
        source = master[low:high].to(target.device, non_blocking=True)
        perturbation.add(source, target[low:high], low, rounding)

    noise.for_pieces(piece, target.numel(), target.device)
