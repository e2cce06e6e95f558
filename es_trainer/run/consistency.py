"""Whether processes that should have the same weights have them."""

from collections import Counter

from ..evolution import EvolutionStrategy
from .processes import ProcessError, Processes


def check_same_weights(processes: Processes, optimizer: EvolutionStrategy, parts: int) -> None:
    """
    Compare checksums of the trained weights.

    Args:
        processes ([`Processes`]):
            Those of the run.
        optimizer ([`EvolutionStrategy`]):
            Has the weights.
        parts (`int`):
            Processes among which the weights are shared out: the first `parts` of them have all, and so on.

    Raises:
        [`ProcessError`]: If they differ; names the parameters and processes.
    """
    if processes.count == parts:
        return
    checksums = processes.exchange(optimizer.weights.checksums)
    found = []
    for first in range(parts):  # processes that have the same part of the weights
        most_have, _ = Counter(map(tuple, checksums[first::parts])).most_common(1)[0]
        found += [
            f"`{shard.name}` on process {rank}"
            for rank in range(first, len(checksums), parts)
            for shard, number, usual in zip(optimizer.weights.shards, checksums[rank], most_have, strict=True)
            if number != usual
        ]
    if found:
        raise ProcessError(
            f"After update {optimizer.updates}, processes have different weights: {', '.join(found[:4])}"
            f"{f' and {len(found) - 4} more' if len(found) > 4 else ''}. Something changed them there and not on "
            "the others: a callback or reward function, or faulty memory. Nothing was saved; resume from the last "
            "checkpoint."
        )
