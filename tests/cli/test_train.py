"""Training through the command line: the same run by every way to start it."""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from argparse import SUPPRESS
from dataclasses import Field, fields
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_RUN
from hub_server import TOKEN, serve
from safetensors.torch import load_file
from transformers import TrainingArguments

from es_trainer import ESConfig, replay
from es_trainer.cli import main
from es_trainer.cli.help import GROUPS, TRAIN_HELP, train_help
from es_trainer.scripts import es
from es_trainer.scripts.launch import accelerate_configs, find_accelerate_config, from_yaml


ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SAVED = {"save_strategy": "steps", "save_steps": 2}
REWARDS = """
import os
from pathlib import Path

from es_trainer.rewards import completion_text


def letters(completions, trainer_state, **kwargs):
    Path("processes-" + os.environ.get("WORLD_SIZE", "1")).touch()
    with open("steps", "a") as file:
        print(trainer_state.global_step, file=file)
    return [sum(map(str.islower, completion_text(completion))) for completion in completions]


def fail(completions, **kwargs):
    Path("threads-" + os.environ.get("OMP_NUM_THREADS", "free")).touch()
    raise OSError("out of ink")


def solve(example, endpoint):
    import openai

    with openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:
        reply = client.completions.create(model=endpoint.model, prompt=example["question"])
    return float(len(reply.choices[0].text))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a module of reward functions."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "my_rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_rewards", None)


@pytest.fixture(scope="module")
def options(model_folder) -> dict:
    own = {"model_name_or_path": model_folder, "task": "conciseness", "reward_funcs": ["my_rewards.letters"]}
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 16}
    return {**TINY_RUN, **own, **evaluation}


def write(path: Path, **options) -> str:
    path.write_text(yaml.dump(options))
    return str(path)


def run_here(config: str, *argv: str) -> None:
    argv = ["--config", config, "--trust_remote_code", *argv]  # my_rewards
    es.main(*es.make_parser().parse_args_and_config(argv, fail_with_unknown_args=False))


def launch(folder: Path, config: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "es_trainer.cli", "train", "--config", config, "--trust_remote_code", *argv]
    return subprocess.run(
        command, cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=300
    )


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def logs(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def assert_same(mine: Path, theirs: Path) -> None:
    mine, theirs = trained(mine), trained(theirs)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def run(folder, options) -> Path:
    """The run, started in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_here(write(folder / "here.yaml", **{**options, **SAVED}, output_dir="run"))
    return folder / "run"


def test_a_run(run, model_folder):
    assert (run / "tokenizer.json").is_file()
    state = json.loads((run / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert any("eval_rewards/letters/mean" in log for log in state["log_history"])
    replayed = replay(model_folder, run).state_dict()
    assert all(torch.equal(replayed[name], tensor) for name, tensor in trained(run).items())


def test_launched_as_one_process_and_pushed_to_the_hub(folder, options, run):
    config = write(folder / "one.yaml", **options, output_dir="one")
    with serve() as hub:
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        result = launch(folder, config, "--push_to_hub", "--hub_model_id", "user/one", **online)
        assert result.returncode == 0, result.stderr
        pushed = hub.models["user/one"].files
        assert "End of training" in [commit.message for commit in hub.models["user/one"].commits]
    assert_same(folder / "one", run)
    assert pushed["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert "README.md" in pushed
    assert f"Model saved to {folder / 'one'}." in result.stdout
    assert "Model pushed to the Hub in https://huggingface.co/user/one." in result.stdout


def test_launched_as_two_processes(folder, options, run):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    # The flag overrides the file
    config = write(folder / "two.yaml", **options, output_dir="two", accelerate_config="zero3", num_machines=1)
    result = launch(folder, config, "--accelerate_config", "cpu_two_processes", "--main_process_port", port)
    assert result.returncode == 0, result.stderr
    assert_same(folder / "two", run)
    assert (folder / "processes-2").exists()
    assert result.stdout.count("Training completed.") == 1


def test_a_failure_ends_with_the_scripts_error_alone(folder, options, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = write(folder / "failing.yaml", **{**options, "reward_funcs": "my_rewards.fail"}, output_dir="failing")
    with pytest.raises(SystemExit) as exit:
        main(["train", "--config", config, "--trust_remote_code"])
    assert exit.value.code == 1
    error = capfd.readouterr().err.rstrip()
    assert error.endswith("RuntimeError: Reward function 'fail' raised OSError: out of ink")
    assert (folder / "threads-free").exists()  # as many as torch takes by itself


def test_a_copy_of_the_example_is_a_script(folder, options, run, monkeypatch):
    assert (ROOT / "examples" / "scripts" / "es.py").resolve() == Path(es.__file__)
    script = shutil.copy(ROOT / "examples" / "scripts" / "es.py", folder / "my_es.py")
    config = write(folder / "copy.yaml", **options, num_processes=8)
    monkeypatch.setattr(sys, "argv", ["my_es.py", "--config", config, "--trust_remote_code", "--output_dir", "copied"])
    runpy.run_path(str(script), run_name="__main__")
    assert_same(folder / "copied", run)


@pytest.mark.parametrize("checkpoint", ["true", "resumed/checkpoint-2"])
def test_resume(folder, run, checkpoint):
    shutil.rmtree(folder / "resumed", ignore_errors=True)
    shutil.copytree(run / "checkpoint-2", folder / "resumed" / "checkpoint-2")
    (folder / "steps").unlink()
    run_here("here.yaml", "--output_dir", "resumed", "--resume_from_checkpoint", checkpoint)
    assert set((folder / "steps").read_text().split()) == {"2", "3"}  # the last step and the evaluation after it
    assert_same(folder / "resumed", run)


def test_an_adapter(folder, run, model_folder):
    adapter = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    run_here("here.yaml", *adapter, "--output_dir", "adapter", "--max_steps", "1")
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_a_program(folder, options):
    (folder / "questions.jsonl").write_text('{"question": "Say one"}\n{"question": "Say two"}\n')
    given = {name: value for name, value in options.items() if name not in ("task", "reward_funcs")}
    config = write(folder / "agent.yaml", **given | {"dataset_name": "questions.jsonl", "eval_strategy": "no"})
    run_here(config, "--agent", "my_rewards.solve", "--output_dir", "agent", "--max_steps", "1")
    assert "rewards/solve/mean" in logs(folder / "agent")[0]


def test_a_dataset_without_held_out_prompts(folder, options):
    (folder / "rows.jsonl").write_text('{"prompt": "Say one"}\n{"prompt": "Say two"}\n')
    config = write(folder / "rows.yaml", **{**options, "task": None, "dataset_name": "rows.jsonl", "max_steps": 1})
    run_here(config, "--output_dir", "rows", "--eval_strategy", "no")
    assert any("reward" in log for log in logs(folder / "rows"))
    with pytest.raises(ValueError, match="`dataset_test_split='test'`: the dataset has the splits 'train'"):
        run_here(config, "--output_dir", "rows")


def test_options_of_the_model(folder, run):
    run_here("here.yaml", "--dtype", "bfloat16", "--output_dir", "bfloat16", "--max_steps", "1")
    assert {tensor.dtype for tensor in trained(folder / "bfloat16").values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="`quantization_config` without `peft_config`"):
        run_here("here.yaml", "--load_in_8bit", "--output_dir", "quantized")


# ---- what is refused before anything is launched ----


@pytest.fixture
def refused(folder, options, tmp_path, capsys, monkeypatch):
    def try_it(*argv: str, **changes) -> str:
        """The error. Nothing must have been launched."""
        monkeypatch.setattr(subprocess, "Popen", None)
        config = {**options, "output_dir": str(tmp_path / "run"), **changes}
        config = {name: value for name, value in config.items() if value is not None}
        with pytest.raises(SystemExit) as exit:
            main(["train", "--config", write(tmp_path / "config.yaml", **config), "--trust_remote_code", *argv])
        assert exit.value.code == 2
        assert not (tmp_path / "run").exists()
        error = capsys.readouterr().err
        assert error.startswith("es-trainer train: error: ") and error.count("\n") == 1
        return error

    return try_it


def test_unknown_names(refused):
    assert "unknown option '--populaton_size': did you mean '--population_size'?" in refused("--populaton_size", "3")
    assert "unknown YAML key 'max_step': did you mean 'max_steps'?" in refused(max_step=3)
    assert "unknown option '--accelerate_confg': did you mean '--accelerate_config'?" in refused(
        *("--accelerate_confg", "zero3")
    )


def test_values(refused):
    assert "`population_size=1` is not valid" in refused("--population_size", "1")
    assert "did you mean 'countdown'?" in refused("--task", "countdwn")
    assert "did you mean 'conciseness_reward'?" in refused("--reward_funcs", "concisness_reward")
    assert "`model_name_or_path` is not set" in refused(model_name_or_path=None)
    assert "`agent='solve'` is no dotted path of a function" in refused("--agent", "solve")
    assert "set `task`" in refused(task=None)
    assert "`accelerate_config='zero_3'` is neither a file nor one of cpu_two_processes" in refused(
        *("--accelerate_config", "zero_3")
    )
    assert "'nine' belongs to no option" in refused("--num_processes", "1", "nine")


def test_what_does_not_exist(refused):
    assert "`dataset_name='missing.jsonl'`: there is no such file" in refused(
        "--dataset_name", "missing.jsonl", task=None
    )
    assert "`model_name_or_path='a/b/c'`: there is no such folder" in refused(model_name_or_path="a/b/c")
    assert "`--config` or `--recipe` is given twice" in refused("--config", "nowhere.yaml")
    assert "`recipe='countdwn/x'` is none of those" in refused("--recipe", "countdwn/x")


def test_a_config_that_does_not_exist(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--config", "nowhere.yaml"])
    assert exit.value.code == 2
    assert "No such file or directory: 'nowhere.yaml'" in capsys.readouterr().err


def test_a_mistake_that_the_script_finds_is_one_line(folder, options):
    (folder / "questions.jsonl").write_text('{"question": "Say one"}\n')
    given = {**options, "task": None, "dataset_name": "questions.jsonl", "eval_strategy": "no"}
    config = write(folder / "questions.yaml", **given, output_dir="questions")
    result = launch(folder, config)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("es.py: error: `train_dataset` has no column 'prompt'")
    assert "Traceback" not in result.stderr
    shown = launch(folder, config, "--debug")
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr and "ValueError: `train_dataset` has no column" in shown.stderr


def test_what_a_mode_refuses_is_one_line_before_data_are_loaded(folder, options):
    given = {
        **options,
        "task": None,
        "dataset_name": "letters.jsonl",
        "use_vllm": True,
        "vllm_tensor_parallel_size": 2,
    }
    (folder / "letters.jsonl").write_text("no JSON")
    result = launch(folder, write(folder / "parts.yaml", **given, output_dir="parts"))
    assert result.returncode == 2
    said = (
        "es.py: error: `vllm_tensor_parallel_size=2` is not valid: it must divide the number of processes, which is 1."
    )
    assert result.stderr.splitlines()[-1].startswith(said)


# ---- help ----


def listed_fields() -> list[Field]:
    """Fields of the config, without those that are accepted for a GRPOConfig's sake and have no effect."""
    return [field for field in fields(ESConfig) if field.init and field.metadata.get("help") != SUPPRESS]


def test_help_has_the_options_of_a_run_in_groups():
    parser = es.make_parser()
    assert TRAIN_HELP.read_text() == train_help(parser), "run `python -m es_trainer.cli.help`"
    shown = [name for names in GROUPS.values() for name in names]
    assert len(shown) == len(set(shown))
    own = {field.name for field in listed_fields()} - {field.name for field in fields(TrainingArguments)}
    assert "sigma" in own and own <= set(shown)


def test_help_all_has_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--help-all"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{field.name}" in printed for field in listed_fields())


# ---- options of accelerate ----


def test_accelerate_configs_are_those_of_the_recipes(tmp_path):
    recipes = {file.stem: file.resolve() for file in (ROOT / "recipes" / "accelerate_configs").glob("*.yaml")}
    assert accelerate_configs() == recipes
    assert find_accelerate_config("zero3") == recipes["zero3"]
    (tmp_path / "mine.yaml").touch()
    assert find_accelerate_config(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"
    with pytest.raises(ValueError, match="did you mean 'multi_gpu'"):
        find_accelerate_config("multigpu")


def test_flags_of_accelerate_in_yaml():
    left_over = ["--multi_gpu", "True", "--num_processes", "2", "--cpu", "False", "--fsdp_offload_params", "True"]
    assert from_yaml(left_over) == ["--multi_gpu", "--num_processes", "2", "--fsdp_offload_params", "True"]
