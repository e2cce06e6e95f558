"""The examples of agents run for two steps, with a tiny model that knows how tools are called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from calling import calling_model, calling_tokenizer, needs_tools
from hub_server import File, Repo, serve


pytestmark = needs_tools
TESTS = Path(__file__).parents[1]
SCRIPTS = sorted((TESTS.parent / "examples" / "agents").glob("*.py"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serve() as hub:
        folder = tmp_path_factory.mktemp("model")
        calling_model().save_pretrained(folder)
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
    command = [sys.executable, str(TESTS / "run_example.py"), str(script), "16"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (folder,) = [path for path in tmp_path.iterdir() if path.name.startswith("Qwen")]
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 2


def test_there_are_examples_of_each_way():
    ways = ("environment", "openai_client", "shell_script", "smolagents_agent", "tools")
    assert tuple(script.stem for script in SCRIPTS) == ways
