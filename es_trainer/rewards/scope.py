"""Rewards that belong to all completions of a member at once."""

from collections.abc import Callable
from typing import TypeVar


F = TypeVar("F", bound=Callable)

SCOPES = ("completion", "member")


def per_member(function: F) -> F:
    """
    Declares that a reward function returns one number for all completions of a member, not one for each: the metric of
    a whole set, such as F1, corpus BLEU, a calibration error or diversity. It may also return `None`.

    It sets the function's attribute `reward_scope` to `"member"`. The function is called with all completions that a
    member gives in a step, whichever processes generate them. In an evaluation, it is called with those of the whole
    dataset. The number counts as the reward of each of these completions.

    Example:

    ```python
    from es_trainer.rewards import completion_text, per_member


    @per_member
    def share_of_distinct_answers(completions, **kwargs):
        texts = [completion_text(completion) for completion in completions]
        return len(set(texts)) / len(texts)
    ```
    """
    function.reward_scope = "member"
    return function
