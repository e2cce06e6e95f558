"""What a probe has found, and what follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TriedSigma:
    """
    What one sigma does to the members of a step. See `docs/monitoring.md` for what the numbers are.

    Args:
        sigma (`float`):
            Standard deviation of their noise.
        center (`float`, *optional*), reward (`float`, *optional*):
            Mean rewards of the unperturbed weights and of the members.
        spread (`float`, *optional*):
            Standard deviation of the members' fitness.
        signal (`float`, *optional*):
            Its reliability.
        seconds (`float`), tokens (`int`):
            What the step took.
    """

    sigma: float
    center: float | None
    reward: float | None
    spread: float | None
    signal: float | None
    seconds: float
    tokens: int

    @property
    def cost(self) -> float:
        """What the noise costs the members."""
        return self.center - self.reward

    @property
    def expected_gain(self) -> float:
        """
        What an update of `learning_rate=sigma` gains if rewards are linear in the weights. Z-scores times differences
        from the mean are the spread, and the signal says how much of that is no luck; see
        [`~evolution.signal.expected_gain`]. It is 0 where that cannot be told.
        """
        return self.spread * self.signal if self.signal is not None else 0.0


def best_of(tried: Sequence[TriedSigma]) -> TriedSigma | None:
    """
    The sigma to take: the smallest one whose signal is at least half of the highest, of those whose noise costs the
    members no more than they differ by. Larger noise has more signal, but less and less of it is linear in the
    weights, which is what the update follows; that a small sigma's update is short, a higher learning rate makes up
    for. `None` if there is none with a signal.
    """
    good = [one for one in tried if one.expected_gain > 0 and one.cost <= one.spread]
    highest = max((one.signal for one in good), default=None)
    return min((one for one in good if one.signal >= highest / 2), key=lambda one: one.sigma, default=None)


@dataclass
class Found:
    """
    What a probe has found.

    Args:
        sigmas (`list[TriedSigma]`):
            All that were tried.
        sigma ([`TriedSigma`], *optional*):
            The one to take, if there is one.
        before (`float`, *optional*):
            Held-out reward without an update.
        held_out (`dict[float, float]`):
            Held-out reward by learning rate, after one update with that sigma.
    """

    sigmas: list[TriedSigma] = field(default_factory=list)
    sigma: TriedSigma | None = None
    before: float | None = None
    held_out: dict[float, float] = field(default_factory=dict)

    @property
    def best_held_out(self) -> float | None:
        """The learning rate of the highest held-out reward. `None` if no step raises it."""
        best = max(self.held_out, key=self.held_out.get, default=None)
        return None if best is None or self.held_out[best] <= self.before else best

    @property
    def learning_rate(self) -> float | None:
        """
        The one to take for a run: half of that of the best single step. If a step gains `a * length - b * length**2`,
        half the best length gains 3/4 as much at a quarter of the cost `b * length**2`, and the best of several
        lengths was also lucky. `None` if no step raises the held-out reward.
        """
        return None if self.best_held_out is None else self.best_held_out / 2
