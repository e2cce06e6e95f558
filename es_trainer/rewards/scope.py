"""What reward functions say of themselves: what their number is of, and how long they may take."""

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


def time_limit(seconds: float, reward: float | None = None) -> Callable[[F], F]:
    """
    Gives a reward function a time limit of its own, in place of `reward_timeout`.

    It sets the function's attributes `reward_timeout` and `reward_on_timeout`. The function is called in a process
    that can be ended, whatever it does there, even if `reward_workers` is 0. It is called with one completion at a
    time, so that one which takes too long costs the others nothing.

    Args:
        seconds (`float`):
            For one completion; for all of a member if the function is [`per_member`].
        reward (`float`, *optional*):
            What a completion counts that takes longer, such as `0.0` for a program that does not end. If `None`, the
            function does not apply to it.

    Example:

    ```python
    from es_trainer.rewards import completion_text, time_limit


    @time_limit(10, reward=0.0)
    def passes(completions, tests, **kwargs):
        return [float(run(completion_text(c), test)) for c, test in zip(completions, tests)]
    ```
    """

    def set_attributes(function: F) -> F:
        function.reward_timeout, function.reward_on_timeout = seconds, reward
        return function

    return set_attributes
