"""Noise that is added to the working weights and subtracted again, where they have no masters."""

from collections.abc import Callable, Iterator, Sequence

from ..noise import noise
from ..noise.shapes import Sum
from .shard import Shard


class InPlace:
    """Adds one perturbation to the working weights and takes it out again, also if adding it was interrupted."""

    def __init__(self):
        self._written = (0, 0)  # from which weight to which it is in them, all shards counted through

    def add(self, shards: Sequence[Shard], perturbation: Callable[[Shard], Sum]) -> None:
        """
        Perturb all weights.

        Args:
            shards (`list[Shard]`):
                The weights.
            perturbation (`Callable`):
                Called with a shard; returns what to add to it.
        """
        self._written = (0, 0)
        for stop in self._add(shards, perturbation, 0, sum(shard.part.numel for shard in shards)):
            self._written = (0, stop)

    def undo(self, shards: Sequence[Shard], perturbation: Callable[[Shard], Sum]) -> None:
        """Add the opposite perturbation to as many weights as `add` has perturbed, and to no more."""
        start, stop = self._written
        for done in self._add(shards, perturbation, start, stop):
            self._written = (done, stop)

    def _add(
        self, shards: Sequence[Shard], perturbation: Callable[[Shard], Sum], start: int, stop: int
    ) -> Iterator[int]:
        """Perturb the weights from `start` to `stop`, all shards counted through; yields how far it has come."""
        offset = 0
        for shard in shards:
            addend = None
            size = shard.part.numel
            for low in range(0, size, noise.CUDA_PIECE):
                high = min(low + noise.CUDA_PIECE, size)
                if offset + low < start or offset + high > stop:
                    continue
                addend = addend or perturbation(shard)
                piece = shard.working[low:high]
                before = piece.clone()
                try:
                    addend.add(piece, piece, low)
                except BaseException:
                    piece.copy_(before)
                    raise
                yield offset + high
            offset += size
