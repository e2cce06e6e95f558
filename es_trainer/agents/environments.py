"""Environments that a model acts in by tools: one instance for each rollout."""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from ..config import ESConfig
from ..data import NO_PROMPT
from .toolbox import Toolbox


NOT_TOOLS = ("reset", "get_reward")

EnvironmentFactory = Callable[[], Any]


class Environments:
    """
    Environments of one kind or of several, whose public methods are tools beside those that all have.

    Instances are used again after a `reset`, but not while rewards of their last rollout may still be computed.

    Args:
        factory (`Callable` or `dict[str, Callable]`):
            Makes an environment, or makes those of each name. With names, each row of a dataset says which it wants in
            its column `"environment"`.
        tools (`Sequence[Callable]`):
            Tools that all environments have.

    Raises:
        `TypeError`: If a factory cannot be called.
        `ValueError`: If an environment has no method `reset`, or a method cannot be shown to the model.
    """

    def __init__(self, factory: EnvironmentFactory | Mapping[str, EnvironmentFactory], tools: Sequence[Callable] = ()):
        self.named = isinstance(factory, Mapping)
        self.factories: dict[str | None, EnvironmentFactory] = dict(factory) if self.named else {None: factory}
        self.toolboxes: dict[str | None, Toolbox] = {}
        self.kinds: list[type] = []  # those that give a reward
        self._pools: dict[Any, list[dict[str | None, list[Any]]]] = {}
        self._spare: dict[str | None, list[Any]] = {}
        for name, make in self.factories.items():
            if not callable(make):
                raise TypeError(f"`environment_factory` has {make!r}, but must make an environment when it is called.")
            instance = make()
            self._spare[name] = [instance]
            self.toolboxes[name] = Toolbox([*tools, *_methods(instance)])
            kind = type(instance)
            if not callable(getattr(kind, "reset", None)):
                raise ValueError(
                    f"The environment `{kind.__name__}` has no method `reset(**row)`, which begins a rollout and may "
                    "return a text for the model. Write one."
                )
            if hasattr(kind, "get_reward") and kind not in self.kinds:
                self.kinds.append(kind)

    def reward_funcs(self) -> list[Callable]:
        """A reward function of each kind that has a method `get_reward`, under its name."""
        return [_reward_func(kind) for kind in self.kinds]

    def dataset(self, args: ESConfig) -> Dataset | None:
        """Rows with nothing in their prompts, for environments that make their own; `None` if steps are not known."""
        if self.named or args.max_steps <= 0:
            return None
        return Dataset.from_dict({"prompt": [NO_PROMPT] * args.largest_num_rows})

    def name_of(self, row: dict[str, Any]) -> str | None:
        """
        Which environment a row wants.

        Raises:
            `ValueError`: If there is none of that name.
        """
        if not self.named:
            return None
        name = row.get("environment")
        if name not in self.factories:
            raise ValueError(
                f"A row has `environment={name!r}`, but `environment_factory` has "
                f"{', '.join(map(repr, self.factories))}."
            )
        return name

    def take(self, names: Sequence[str | None], who: Any) -> list[Any]:
        """
        Instances for rollouts that begin together. Those of the last call are not among them.

        Args:
            names (`Sequence[str]`):
                Which environment each rollout wants.
            who (`Any`):
                Who asks: several engines work at the same time, in threads.
        """
        if who not in self._pools:
            first, self._spare = self._spare, {}
            self._pools[who] = [{name: pool.get(name, []) for name in self.factories} for pool in (first, {})]
        self._pools[who].reverse()
        used = dict.fromkeys(self.factories, 0)
        taken = []
        for name in names:
            pool = self._pools[who][0][name]
            if used[name] == len(pool):
                pool.append(self.factories[name]())
            taken.append(pool[used[name]])
            used[name] += 1
        return taken


def begin(environment: Any, row: dict[str, Any], named: bool) -> list[dict[str, Any]]:
    """
    Reset an environment for a row.

    Args:
        environment (`Any`):
            The environment.
        row (`dict[str, Any]`):
            The dataset's row, which `reset` gets by keyword.
        named (`bool`):
            Whether the column `"environment"` is the environment's name, and not for `reset`.

    Returns:
        `list[dict[str, Any]]`: the row's prompt, with what `reset` returned behind its last message.

    Raises:
        `TypeError`: If `reset` returns neither a text nor `None`.
    """
    options = {key: value for key, value in row.items() if not (named and key == "environment")}
    observation = environment.reset(**options)
    prompt = row["prompt"]
    if observation is None:
        return prompt
    if not isinstance(observation, str):
        raise TypeError(
            f"`{type(environment).__name__}.reset` returned {type(observation).__name__}, but must return a text or "
            "None."
        )
    *before, last = prompt
    return [*before, {**last, "content": last["content"] + observation}]


def _methods(instance: Any) -> list[Callable]:
    # Of the class: those of the instance would evaluate its properties
    methods = inspect.getmembers(type(instance), predicate=inspect.isfunction)
    return [getattr(instance, name) for name, _ in methods if name not in NOT_TOOLS and not name.startswith("_")]


def _reward_func(kind: type) -> Callable:
    if inspect.iscoroutinefunction(kind.get_reward):

        async def get_reward(environments: list[Any], **kwargs: Any) -> list[float | None]:
            mine = [i for i, each in enumerate(environments) if type(each) is kind]
            rewards = dict(zip(mine, await asyncio.gather(*(environments[i].get_reward() for i in mine)), strict=True))
            return [rewards.get(i) for i in range(len(environments))]

    else:

        def get_reward(environments: list[Any], **kwargs: Any) -> list[float | None]:
            return [each.get_reward() if type(each) is kind else None for each in environments]

    get_reward.__name__ = kind.__name__
    return get_reward
