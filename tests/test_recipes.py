"""Every recipe, with a tiny model."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
import yaml
from conftest import needs_reasoning_gym, save_tiny
from tiny_vision import make_tiny
from transformers import AutoModelForCausalLM

from es_trainer import tasks
from es_trainer.scripts import es
from es_trainer.scripts.recipes import recipes


ROOT = Path(__file__).parents[1]
RECIPES = recipes()
PAPER = {
    "population_size": 30,
    "sigma": 1e-3,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant",
    "perturbation": "gaussian",
    "temperature": 0.0,
    "num_generations": 1,
    "antithetic": False,
    "fitness_shaping": "z_score",
    "es_optimizer": "sgd",
    "weight_decay": 0.0,
}
COUNTDOWN = {**PAPER, "max_steps": 500, "num_prompts_per_step": 200, "max_completion_length": 1024}
OF_THE_PAPER = {
    "countdown/qwen2.5-0.5b-instruct": ("Qwen/Qwen2.5-0.5B-Instruct", COUNTDOWN),
    "countdown/qwen2.5-1.5b-instruct": ("Qwen/Qwen2.5-1.5B-Instruct", COUNTDOWN),
    "countdown/qwen2.5-3b-instruct": ("Qwen/Qwen2.5-3B-Instruct", COUNTDOWN),
    "countdown/qwen2.5-7b-instruct": ("Qwen/Qwen2.5-7B-Instruct", COUNTDOWN),
    "countdown/llama-3.2-1b-instruct": ("meta-llama/Llama-3.2-1B-Instruct", COUNTDOWN),
    "countdown/llama-3.2-3b-instruct": ("meta-llama/Llama-3.2-3B-Instruct", COUNTDOWN),
    "countdown/llama-3.1-8b-instruct": ("meta-llama/Llama-3.1-8B-Instruct", COUNTDOWN),
    "conciseness/qwen2.5-7b-instruct": (
        "Qwen/Qwen2.5-7B-Instruct",
        {**PAPER, "max_steps": 1000, "num_prompts_per_step": 48, "max_completion_length": 100},
    ),
    "math/qwen2.5-math-7b": (
        "Qwen/Qwen2.5-Math-7B",
        {**PAPER, "max_steps": 336, "num_prompts_per_step": 200, "max_completion_length": 3000},
    ),
}
PROBLEMS = {
    "gsm8k": [{"question": f"{n} and {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(4)],
    "math": [{"problem": f"{n} + {n}?", "level": "Level 3", "solution": rf"$\boxed{{{2 * n}}}$"} for n in range(4)],
}


def read(name: str) -> dict:
    return yaml.safe_load(RECIPES[name].read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny model whose context takes the prompts of every task, a byte a token."""
    return save_tiny(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def folder_of_vision(tmp_path_factory) -> str:
    """A tiny model that reads images."""
    folder = tmp_path_factory.mktemp("vision")
    for part in make_tiny("gemma3"):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def puzzles_made_once():
    """Making those of `sudoku` takes seconds, and several recipes have the same."""
    with pytest.MonkeyPatch.context() as patch:
        for make_task in (tasks.arc, tasks.sudoku):
            cached = functools.cache(make_task)
            patch.setattr(tasks, make_task.__name__, functools.wraps(make_task)(lambda cached=cached: cached()))
        yield


@pytest.fixture
def tiny_run(folder, tmp_path):
    """Make the options of a short run of a recipe."""

    def make(name: str) -> list[str]:
        recipe = read(name)
        options = {
            "config": RECIPES[name],
            "model_name_or_path": folder,
            "output_dir": tmp_path / "run",
            "use_cpu": True,
            "bf16": False,
            "population_size": 4,
            "sigma": 0.05,
            "learning_rate": 0.02,
            "num_prompts_per_step": 2,
            "max_completion_length": 8,
            "max_steps": 2,
            "per_device_eval_batch_size": 50,
            "report_to": "none",
            "disable_tqdm": True,
        }
        if "eval_strategy" in recipe:
            options["eval_steps"] = 2
        if recipe["task"] in PROBLEMS:
            options["dataset_name"] = tmp_path / "data"
            options["dataset_name"].mkdir()
            for split in ("train", "test"):
                lines = "\n".join(map(json.dumps, PROBLEMS[recipe["task"]]))
                (options["dataset_name"] / f"{split}.jsonl").write_text(lines)
        return [str(part) for option, value in options.items() for part in (f"--{option}", value)]

    return make


def check_run(output: Path, folder: str, reward: str) -> None:
    """Two updates were made, with this reward, and what was saved is another model."""
    history = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history if "step" in line] == [1, 2]
    logs = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert sum(f"rewards/{reward}/mean" in log for log in logs) == 2
    after = AutoModelForCausalLM.from_pretrained(output)
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=after.dtype)
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_is_known(name):
    *arguments, unknown = es.make_parser().parse_args_and_config(
        ["--config", str(RECIPES[name]), "--use_cpu", "true"], return_remaining_strings=True
    )
    assert unknown == []
    es.check(*arguments)
    script_args, training_args, model_args, _ = arguments
    assert hasattr(tasks, script_args.task)
    assert training_args.lr_scheduler_type == "constant"
    assert training_args.output_dir == str(Path.cwd() / "runs" / name.replace("/", "-"))
    # The file says all that a reader asks for, instead of leaving it to defaults
    assert read(name).keys() >= {"population_size", "sigma", "learning_rate", "perturbation", "temperature"}


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_settings_of_the_paper(name):
    model, settings = OF_THE_PAPER[name]
    script_args, training_args, model_args, _ = es.make_parser().parse_args_and_config(
        ["--config", str(RECIPES[name]), "--use_cpu", "true"]
    )
    assert script_args.task == name.split("/")[0]
    assert (model_args.model_name_or_path, model_args.dtype) == (model, "bfloat16")
    assert {option: getattr(training_args, option) for option in settings} == settings


def test_every_recipe_of_a_paper_task_is_checked():
    assert {name for name in RECIPES if name.startswith(("countdown/", "conciseness/"))} <= set(OF_THE_PAPER)


def marked(name: str):
    return pytest.param(name, marks=[needs_reasoning_gym] if name.startswith(("arc/", "sudoku/")) else [])


@pytest.mark.parametrize("name", list(map(marked, RECIPES)))
def test_run(name, tiny_run, folder, folder_of_vision, tmp_path, monkeypatch):
    arguments = es.make_parser().parse_args_and_config(tiny_run(name))
    script_args, _, model_args, _ = arguments
    if script_args.task == "count_shapes":
        model_args.model_name_or_path = folder = folder_of_vision
    # A tiny model solves nothing: the task's own reward is the same for all members
    (reward,) = getattr(tasks, script_args.task)(**_data(script_args)).reward_funcs
    monkeypatch.setattr(conftest, "reward_of_the_task", reward, raising=False)
    script_args.reward_funcs = ["conftest.reward_of_the_task", "conftest.letters"]
    es.main(*arguments)
    check_run(tmp_path / "run", folder, reward.__name__)


def _data(script_args) -> dict[str, str]:
    return {} if script_args.dataset_name is None else {"dataset_name": script_args.dataset_name}


def test_accelerate_launch(tiny_run, folder, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    options = tiny_run("smollm2/conciseness")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, "examples/scripts/es.py", *options], cwd=ROOT, env=environment, check=True)
    check_run(tmp_path / "run", folder, "conciseness_reward")


@pytest.mark.parametrize("task", sorted({name.split("/")[0] for name in RECIPES}))
def test_readme_names_every_recipe(task):
    readme = (ROOT / "recipes" / task / "README.md").read_text()
    for name, file in RECIPES.items():
        if name.startswith(f"{task}/"):
            assert file.name in readme
