"""What programs return, as rewards and columns."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from .programs import AgentFunc, name_of


class Outcome(NamedTuple):
    """
    What a program returned.

    Args:
        reward (`float`, *optional*):
            The reward, or the sum of `by_name`.
        by_name (`dict[str, float]`):
            Rewards by name.
        columns (`dict[str, Any]`):
            What is logged with the completion.
    """

    reward: float | None
    by_name: dict[str, float]
    columns: dict[str, Any]

    @classmethod
    def of(cls, result: Any) -> "Outcome":
        """
        Raises:
            `TypeError`: If it is a dict without a reward.
        """
        if not isinstance(result, dict):
            return cls(result, {}, {})
        if "reward" not in result:
            raise TypeError(
                f"a program returned a dict with {', '.join(map(repr, result)) or 'nothing'}: it must have 'reward', "
                "which is a number, or a dict of numbers by name"
            )
        reward, columns = result["reward"], {key: value for key, value in result.items() if key != "reward"}
        if isinstance(reward, dict):
            return cls(sum(reward.values()), reward, columns)
        return cls(reward, {}, columns)


def reward_func(function: AgentFunc) -> Callable:
    """
    The reward function of what a program returns, under the program's name. It logs rewards by name as `agent/<name>`,
    the number of calls, how often programs failed, and the columns of dicts with the completions.

    Args:
        function (`Callable`):
            The program.
    """

    def rewards(
        agent_result: list[Any],
        agent_calls: list[list[dict[str, Any]]],
        agent_error: list[str | None],
        log_extra: Callable,
        log_metric: Callable,
        **kwargs: Any,
    ) -> list[float | None]:
        outcomes = [Outcome.of(result) for result in agent_result]
        for outcome, calls, error in zip(outcomes, agent_calls, agent_error, strict=True):
            for name, value in outcome.by_name.items():
                log_metric(f"agent/{name}", value)
            log_metric("agent/calls", len(calls))
            log_metric("agent/failure_frequency", error is not None)
        for name in dict.fromkeys(name for outcome in outcomes for name in outcome.columns):
            log_extra(name, [outcome.columns.get(name) for outcome in outcomes])
        log_extra("calls", [json.dumps(calls, default=str) for calls in agent_calls])
        log_extra("error", agent_error)
        return [outcome.reward for outcome in outcomes]

    rewards.__name__ = name_of(function)
    return rewards
