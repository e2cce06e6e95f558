"""Progress inside a step, logs of completions."""

from .completions import CompletionsLog, print_completions
from .progress import MemberProgressCallback


__all__ = ["CompletionsLog", "MemberProgressCallback", "print_completions"]
