"""The tools that a model may call, and calls of them."""

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from transformers.utils import get_json_schema

from ..event_loop import event_loop
from ..images import with_loaded_images


class ToolResult(NamedTuple):
    """
    What a call of a tool returned.

    Args:
        message (`dict[str, Any]`):
            Message for the model, with the role `"tool"`.
        failed (`bool`):
            Whether there is no such tool, or it raised.
    """

    message: dict[str, Any]
    failed: bool


class Toolbox:
    """
    Functions that a model may call by their names.

    Args:
        tools (`Sequence[Callable]`):
            Functions, which may be async. Their type hints and docstrings are what the model is shown.

    Raises:
        `TypeError`: If a tool is no function.
        `ValueError`: If a tool has no type hints or no docstring, or two have the same name.
    """

    def __init__(self, tools: Sequence[Callable]):
        self.tools = list(tools)
        self.by_name: dict[str, Callable] = {}
        self.schemas = []
        for tool in self.tools:
            if not callable(tool) or not hasattr(tool, "__name__"):
                raise TypeError(f"`tools` has {tool!r}, but must be a list of functions that the model can call.")
            if tool.__name__ in self.by_name:
                raise ValueError(f"`tools` has two functions with the name {tool.__name__!r}: rename one of them.")
            try:
                self.schemas.append(get_json_schema(tool))
            except Exception as error:  # of which Transformers has its own kinds
                raise ValueError(
                    f"The tool `{tool.__name__}` cannot be shown to the model: {error} Give it type hints and a "
                    "docstring with an entry for each argument under `Args:`."
                ) from error
            self.by_name[tool.__name__] = tool

    def call(self, calls: Sequence[dict[str, Any]], environment: Any = None) -> list[ToolResult]:
        """
        Call tools one after the other, and those that are async together.

        Args:
            calls (`Sequence[dict[str, Any]]`):
                The `tool_calls` of a message.
            environment (`Any`, *optional*):
                The environment whose methods are meant, if some of the tools are methods.

        Raises:
            `RuntimeError`: If a tool exits the program.
        """
        results = [self._begin(call, environment) for call in calls]
        waiting = [i for i, (_, value) in enumerate(results) if inspect.isawaitable(value)]
        if waiting:
            together = _all([results[i] for i in waiting])
            values = asyncio.run_coroutine_threadsafe(together, event_loop()).result()
            for i, value in zip(waiting, values, strict=True):
                results[i] = (results[i][0], value)
        return [_result(name, value) for name, value in results]

    def _begin(self, call: dict[str, Any], environment: Any) -> tuple[str, Any]:
        """The name of a tool, and what it returned or raised, or what to wait for."""
        function = call.get("function", call)
        name = function.get("name", "unknown")
        if call.get("type", "function") != "function":
            return name, ValueError(f"Unsupported tool call type: {call['type']}")
        if name not in self.by_name:
            return name, ValueError(f"Tool {name} not found. There are: {', '.join(self.by_name)}.")
        tool = self.by_name[name]
        if environment is not None and inspect.ismethod(tool):
            tool = getattr(environment, name)
        try:
            return name, tool(**function.get("arguments", {}))
        except SystemExit as error:  # which would end training as if it were done
            raise RuntimeError(f"The tool `{name}` raised SystemExit: {error}") from error
        except Exception as error:  # the model is told of whatever a tool raises, and may call it otherwise
            return name, error


async def _all(calls: Sequence[tuple[str, Awaitable[Any]]]) -> list[Any]:
    return await asyncio.gather(*(_returned(name, value) for name, value in calls))


async def _returned(name: str, value: Awaitable[Any]) -> Any:
    """What a tool returned or raised."""
    try:
        return await value
    except SystemExit as error:
        raise RuntimeError(f"The tool `{name}` raised SystemExit: {error}") from error
    except Exception as error:
        return error


def _result(name: str, value: Any) -> ToolResult:
    failed = isinstance(value, Exception)
    if not failed and _are_parts(value):
        return ToolResult(with_loaded_images({"role": "tool", "name": name, "content": value}), failed)
    content = json.dumps({"error": str(value)}) if failed else str(value)
    return ToolResult({"role": "tool", "name": name, "content": content}, failed)


def _are_parts(value: Any) -> bool:
    """Whether a tool has returned parts of a message, such as images and texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(p, dict) and "type" in p for p in value)
