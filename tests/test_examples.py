"""The examples run, with a tiny model and rows of the right shape for what they load from the Hub."""

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer
from datasets import Dataset
from hub_server import File, Repo, serve
from safetensors.torch import load_file


EXAMPLES = Path(__file__).parents[1] / "examples"
PAIRS = sorted(path.stem.removesuffix("_grpo") for path in (EXAMPLES / "grpo_and_es").glob("*_grpo.py"))
ROWS = {
    "trl-lib/tldr": {"prompt": [f"Post {i}. TL;DR:" for i in range(16)], "completion": ["short"] * 16},
    "openai/gsm8k": {"question": [f"How much is {i} + 1?" for i in range(16)], "answer": ["Add. #### 3"] * 16},
}
CONFIGS = b"""---
configs:
- config_name: main
  data_files:
  - split: train
    path: train.jsonl
---
"""
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct")


def put(repos: dict[str, Repo], name: str, files: dict[str, bytes]) -> None:
    repos[name] = Repo(private=False)
    repos[name].add("files", {path: File(data, lfs=False) for path, data in files.items()})


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serve() as hub:
        folder = tmp_path_factory.mktemp("model")
        make_model(max_position_embeddings=512).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        for name in MODELS:
            put(hub.models, name, {path.name: path.read_bytes() for path in folder.iterdir()})
        for name, columns in ROWS.items():
            files = {}
            for split in ("train", "validation"):
                path = folder / f"{split}.jsonl"
                Dataset.from_dict(columns).to_json(path)
                files[path.name] = path.read_bytes()
            if name == "openai/gsm8k":
                files["README.md"] = CONFIGS
            put(hub.datasets, name, files)
        yield hub


@pytest.mark.parametrize("trainer", ["grpo", "es"])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_grpo_script_runs_with_either_trainer(hub, tmp_path, pair, trainer):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, str(Path(__file__).parent / "run_example.py")]
    script = str(EXAMPLES / "grpo_and_es" / f"{pair}_{trainer}.py")
    run = subprocess.run([*command, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (folder,) = [path for path in tmp_path.iterdir() if path.name.startswith("Qwen")]
    (weights,) = folder.glob("*model.safetensors")
    assert any(tensor.any() for tensor in load_file(weights).values())
    if trainer == "es":
        assert len((folder / "history.jsonl").read_text().splitlines()) == 1 + 2


@pytest.mark.parametrize("pair", PAIRS)
def test_they_differ_by_import_and_classes_only(pair):
    grpo, es = ((EXAMPLES / "grpo_and_es" / f"{pair}_{name}.py").read_text().splitlines() for name in ("grpo", "es"))
    changed = [line for line in difflib.ndiff(grpo, es) if line[0] in "+-"]
    assert len(changed) == 6
    renamed = [line.replace("GRPO", "ES").replace("from trl import", "from es_trainer import") for line in grpo]
    assert renamed == es


def test_there_are_three_pairs():
    assert PAIRS == ["lora", "one_reward", "several_rewards"]
