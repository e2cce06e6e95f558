"""Progress inside a step, logs of completions."""

from .completions import CompletionsLog, plain, print_completions
from .progress import MemberProgressCallback


__all__ = ["CompletionsLog", "MemberProgressCallback", "plain", "print_completions"]
