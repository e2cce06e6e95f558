"""Which prompts of the training dataset tell no members apart, and an order that draws these less often."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler


# The batch of a step is drawn while the step before is under way: what came of that is not known yet
DELAY = 2


class SettledPrompts(Sampler[int]):
    """
    Draws rows of a dataset. Those on which all members agreed when they were drawn last are mostly passed over.

    An epoch has as many prompts as the dataset has rows. It goes through all rows in a random order, and where rows
    were passed over, through them again in another. What is drawn for a step follows from the seed and the rewards of
    the steps up to the last but one, so a resumed run draws what one without a break does.

    Args:
        rows (`int`):
            Number of rows.
        batch_size (`int`):
            Rows of a step.
        skip (`float`):
            Probability with which a settled prompt is passed over, in [0, 1).
        seed (`int`):
            Determines the order.
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether the order is random.
        drop_last (`bool`, *optional*, defaults to `False`):
            Whether a last batch that is not full is dropped.
    """

    def __init__(
        self, rows: int, batch_size: int, skip: float, seed: int, shuffle: bool = True, drop_last: bool = False
    ):
        self.rows = rows
        self.batch_size = batch_size
        self.skip = skip
        self.seed = seed
        self.shuffle = shuffle
        self.steps_of_epoch = rows // batch_size if drop_last else -(-rows // batch_size)
        self.epoch = 0
        self._done: list[dict[str, Any]] = []  # the rows of each step, and which of them were settled
        self._drawn: dict[int, tuple[list[int], float]] = {}  # rows by step, and the share that was known then
        self.share = 0.0  # of rows that were known to be settled when those of the last step were drawn

    def __len__(self) -> int:
        return self.rows

    def set_epoch(self, epoch: int) -> None:
        """Draw the rows of this epoch from now on."""
        self.epoch = epoch

    def resume(self, steps: list[dict[str, Any]]) -> None:
        """Go on after steps that were done, of which [`tell`] returned these."""
        self._done = list(steps)

    def tell(self, settled: np.ndarray) -> dict[str, Any]:
        """
        Say of the next step that its rewards are known.

        Args:
            settled (`np.ndarray`):
                Whether all members agreed, for each of its prompts.

        Returns:
            `dict[str, Any]`: its rows, and which of them are settled, as JSON can hold them.
        """
        rows, self.share = self._drawn.pop(len(self._done))
        self._done.append({"rows": rows, "settled": settled.tolist()})
        return self._done[-1]

    def repeat(self, step: dict[str, Any]) -> None:
        """Do the next step as it was done before, when [`tell`] returned this."""
        _, self.share = self._drawn.pop(len(self._done))
        self._done.append(step)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        candidates = self._candidates(rng)
        settled: set[int] = set()
        known = 0
        first = self.epoch * self.steps_of_epoch
        for number, left in enumerate(range(self.rows, 0, -self.batch_size)):
            step = first + number
            told, known = known, max(0, step + 1 - DELAY)
            for done in self._done[told:known]:
                for row, is_settled in zip(done["rows"], done["settled"], strict=True):
                    (settled.add if is_settled else settled.discard)(row)
            batch: list[int] = []
            while len(batch) < min(self.batch_size, left):
                row = next(candidates)
                if row not in batch and not (row in settled and rng.random() < self.skip):
                    batch.append(row)
            self._drawn[step] = batch, len(settled) / self.rows
            yield from batch

    def _candidates(self, rng: np.random.Generator) -> Iterator[int]:
        while True:
            yield from (rng.permutation(self.rows) if self.shuffle else np.arange(self.rows)).tolist()
