"""Progress inside a step, tables of completions, plots."""

from .completions import print_completions
from .plot import RewardPlotCallback
from .progress import MemberProgressCallback


__all__ = ["MemberProgressCallback", "RewardPlotCallback", "print_completions"]
