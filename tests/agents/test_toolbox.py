import asyncio
import json
import time

import pytest
from calling import add

from es_trainer.agents import Toolbox


async def later(text: str) -> str:
    """
    Repeat a text.

    Args:
        text: What to repeat.
    """
    await asyncio.sleep(0.2)
    return text


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_calls_give_messages_in_their_order():
    started = time.perf_counter()
    results = Toolbox([add, later]).call([call("later", text="x"), call("add", a=1, b=2), call("later", text="y")])
    assert [result.message for result in results] == [
        {"role": "tool", "name": "later", "content": "x"},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "tool", "name": "later", "content": "y"},
    ]
    assert not any(result.failed for result in results)
    assert time.perf_counter() - started < 0.39  # those that are async wait together


def test_async_tools_have_one_event_loop_for_good():
    """What they keep open, like a connection, belongs to it."""
    loops = []

    async def where() -> str:
        """Where it runs."""
        loops.append(asyncio.get_running_loop())
        return "here"

    for _ in range(2):
        Toolbox([where]).call([call("where")])
    assert loops[0] is loops[1] and loops[0].is_running()


@pytest.mark.parametrize(
    ("called", "said"),
    [
        (call("add", a=1, b="x"), "unsupported operand"),
        (call("add", a=1), "missing 1 required positional argument: 'b'"),
        (call("subtract", a=1, b=1), "Tool subtract not found. There are: add, later."),
        ({"type": "retrieval", "name": "add"}, "Unsupported tool call type: retrieval"),
    ],
)
def test_the_model_is_told_of_what_went_wrong(called, said):
    (result,) = Toolbox([add, later]).call([called])
    assert result.failed and result.message["role"] == "tool"
    assert said in json.loads(result.message["content"])["error"]


def test_a_tool_does_not_end_the_program():
    def leave() -> None:
        """Leave."""
        raise SystemExit(3)

    async def leave_later() -> None:
        """Leave."""
        leave()

    for tool in (leave, leave_later):
        with pytest.raises(RuntimeError, match=f"The tool `{tool.__name__}` raised SystemExit: 3"):
            Toolbox([tool]).call([call(tool.__name__)])


def unclear(a):
    """
    Do it.

    Args:
        a: A thing.
    """


def undocumented(a: int) -> int:
    return a


@pytest.mark.parametrize(
    ("tools", "error", "message"),
    [
        ([add, "add"], TypeError, "`tools` has 'add', but must be a list of functions"),
        ([add, add], ValueError, "two functions with the name 'add': rename one"),
        (
            [unclear],
            ValueError,
            "The tool `unclear` cannot be shown to the model: .*Give it type hints and a docstring",
        ),
        ([undocumented], ValueError, "The tool `undocumented` cannot be shown to the model"),
    ],
)
def test_tools_that_cannot_be_called(tools, error, message):
    with pytest.raises(error, match=message):
        Toolbox(tools)
