"""The examples of agents run for two steps, with a tiny model that knows how tools are called."""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from calling import calling_tokenizer, needs_tools, train
from hub_server import File, Repo, serve


pytestmark = needs_tools
TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples" / "agents"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
CALLS = ("tools", "environment")  # scripts in which the trainer calls tools


def load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{script}", EXAMPLES / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lesson(tool: Callable, question: str, arguments: dict[str, Any]) -> tuple[list[Callable], list[dict[str, Any]]]:
    call = {"type": "function", "function": {"name": tool.__name__, "arguments": arguments}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [tool], [{"role": "user", "content": question}, answer]


def lessons() -> list[tuple[list[Callable], list[dict[str, Any]]]]:
    """Calls of the tools of the examples, which a tiny model learns by heart."""
    tools, environment = load("tools"), load("environment")
    numbers = random.Random(1)
    found = []
    for seed in range(8):
        question = tools.question(numbers.randint(100, 999), numbers.randint(100, 999))
        maze = environment.Maze()
        view = maze.reset(seed=seed)
        found += [
            lesson(tools.multiply, question, {"a": 2, "b": 3}),
            lesson(maze.go, environment.PROMPT + view, {"direction": maze.way[0]}),
        ]
    return found


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serve() as hub:
        folder = tmp_path_factory.mktemp("model")
        model, _ = train(lessons(), enough=0.005)
        model.save_pretrained(folder)
        calling_tokenizer().save_pretrained(folder)
        name = "Qwen/Qwen2.5-0.5B-Instruct"
        hub.models[name] = Repo(private=False)
        hub.models[name].add("files", {path.name: File(path.read_bytes(), lfs=False) for path in folder.iterdir()})
        yield hub


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs(hub, tmp_path, script):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(TESTS),
    }
    length = "64" if script.stem in CALLS else "16"
    command = [sys.executable, str(TESTS / "run_example.py"), str(script), length]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (folder,) = [path for path in tmp_path.iterdir() if path.name.startswith("Qwen")]
    _, *steps = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    if script.stem in CALLS:
        assert all(step["metrics"]["tools/call_frequency"] > 0.5 for step in steps)
        assert all(step["metrics"]["tools/failure_frequency"] < 0.5 for step in steps)


def test_the_maze_rewards_whoever_is_out_in_time():
    def play(follow_signs: Callable[[int], bool]) -> tuple[float, list[str]]:
        maze = load("environment").Maze()
        views = [maze.reset(seed=3)]
        for turn in range(12):
            direction = re.search("exit is ([a-z]+)", views[-1])
            if direction is None:
                break
            assert maze.get_reward() == 0.0  # at the end only
            views.append(maze.go(direction[1] if follow_signs(turn) else "up"))
        return maze.get_reward(), views

    reward, views = play(lambda turn: True)
    assert (reward, len(views)) == (1.0, 1 + 8)
    assert play(lambda turn: True) == (reward, views)
    assert play(lambda turn: turn not in (0, 5))[0] == 1.0
    lost, views = play(lambda turn: turn not in (0, 5, 9))
    assert (lost, len(views)) == (0.0, 1 + 10)


def test_there_are_examples_of_each_way():
    ways = ("environment", "openai_client", "shell_script", "smolagents_agent", "tools")
    assert tuple(script.stem for script in SCRIPTS) == ways
