import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from es_trainer import __version__
from es_trainer.cli import COMMANDS, _take_debug, main
from es_trainer.scripts.arguments import GenerationArguments, Parser
from es_trainer.scripts.es import make_parser


@dataclass
class Size:
    width: int = 1
    height: float = 2.0


def parse(*argv: str):
    return Parser(Size, prog="measure").parse_args_and_config(argv)


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as exit:
        parse(*argv)
    assert exit.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_the_command_line_overrides_the_yaml_file(yaml_file):
    path = yaml_file("width: 5\nheight: 1e-3\n")
    assert parse("--config", path) == (Size(5, 1e-3),)
    assert parse(f"--config={path}", "--width", "7") == (Size(7, 1e-3),)


def test_an_unknown_option_is_an_error_that_names_the_nearest(capsys):
    message = refused(capsys, "--widht", "3")
    assert message == "measure: error: unknown option '--widht': did you mean '--width'?\n"
    assert refused(capsys, "--widht=3") == message
    assert "did you mean" not in refused(capsys, "--colour", "red")


def test_an_unknown_key_is_an_error_that_names_the_nearest(capsys, yaml_file):
    message = refused(capsys, "--config", yaml_file("hieght: 3\n"))
    assert message == "measure: error: unknown YAML key 'hieght': did you mean 'height'?\n"


def test_unknown_names_are_found_before_anything_is_made(capsys):
    @dataclass
    class Never:
        width: int = 1

        def __post_init__(self):
            raise AssertionError

    with pytest.raises(SystemExit):
        Parser(Never).parse_args_and_config(["--widht", "3"])


def test_what_belongs_to_no_option_is_an_error(capsys):
    assert refused(capsys, "nine") == "measure: error: unknown option 'nine'.\n"


def test_abbreviations_are_unknown(capsys):
    assert "did you mean '--width'" in refused(capsys, "--widt", "3")


def test_a_value_of_the_wrong_type_is_an_error_that_names_the_option(capsys):
    assert refused(capsys, "--width", "wide").endswith("argument --width: invalid int value: 'wide'\n")


def test_options_of_accelerate_launch_are_left_over(yaml_file):
    parser = Parser(Size, launched=True)
    arguments, in_yaml, in_argv = parser.parse_args_and_config(
        ["--config", yaml_file("width: 5\nnum_machines: 2\n"), "--num_processes", "2", "--accelerate_config=zero3"],
        return_remaining_strings=True,
        separate_remaining_strings=True,
    )
    assert arguments == Size(5)
    assert in_yaml == ["--num_machines", "2"]
    assert in_argv == ["--num_processes", "2", "--accelerate_config=zero3"]


def test_names_near_an_option_of_accelerate_launch(capsys):
    with pytest.raises(SystemExit):
        Parser(Size, launched=True).parse_args_and_config(["--num_proceses", "2"])
    assert "'--num_proceses': did you mean '--num_processes'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_says_what_it_takes(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"usage: es-trainer {command}" in capsys.readouterr().out


def test_commands_are_listed(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_an_unknown_command_is_an_error_that_names_all(capsys):
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "invalid choice: 'trian' (choose from " in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--help"], ["train", "--help"], ["eval", "--help"], ["plot", "--help"], ["generate", "--help"]]
)
def test_help_imports_no_torch(argv):
    code = (
        f"import sys; from es_trainer.cli import main\ntry: main({argv})\nfinally: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_generation_arguments_are_those_of_a_config():
    same = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "max_completion_length": 7}
    in_json = {"generation_kwargs": {"num_beams": 1}, "chat_template_kwargs": {"enable_thinking": False}}
    given = {name: json.dumps(value) for name, value in in_json.items()}
    config = GenerationArguments("model", use_cpu=True, batch_size=4, model_revision="v2", **same, **given).to_config()
    assert {name: getattr(config, name) for name in (*same, *in_json)} == {**same, **in_json}
    assert config.generation_batch_size == 4
    assert config.model_init_kwargs == {"dtype": "auto", "revision": "v2", "attn_implementation": None}


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"temperature": -1.0}, {"top_p": 2.0}])
def test_invalid_generation_arguments(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}="):
        GenerationArguments("model", use_cpu=True, **option).to_config()


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"es-trainer {__version__}\n"


def test_a_mistake_is_one_line_and_exit_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["plot", str(tmp_path)])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"es-trainer plot: error: '{tmp_path}' is not the folder of a run")
    assert error.endswith("(--debug shows where.)\n") and error.count("\n") == 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_the_traceback(tmp_path, monkeypatch, place):
    monkeypatch.setattr(os, "environ", {**os.environ})
    argv = ["plot", str(tmp_path)]
    argv.insert(place, "--debug")
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        main(argv)


def test_debug_with_a_value_is_the_trainers():
    assert _take_debug(["train", "--debug", "underflow_overflow"]) == ["train", "--debug", "underflow_overflow"]


# ---- a YAML file runs no code by itself ----


@pytest.mark.parametrize(
    ("text", "option", "named"),
    [
        ("reward_funcs: os.system\n", "reward_funcs", "os.system"),
        ("reward_funcs: [accuracy_reward, my_rewards.brevity]\n", "reward_funcs", "my_rewards.brevity"),
        ("reward_funcs: 'evaluate:f1,postprocess=os.system'\n", "reward_funcs", "evaluate:f1,postprocess=os.system"),
        ("reward_funcs: 'evaluate:someone/metric'\n", "reward_funcs", "evaluate:someone/metric"),
        ("reward_funcs: 'evaluate:mine.py'\n", "reward_funcs", "evaluate:mine.py"),
        ("reward_funcs: 'evaluate:own_metric:score'\n", "reward_funcs", "evaluate:own_metric:score"),
        ("agent: os.system\n", "agent", "os.system"),
        ("trust_remote_code: true\nagent: os.system\n", "agent", "os.system"),
        ("trust_remote_code: true\n", "trust_remote_code", "True"),
        ("model_init_kwargs: {trust_remote_code: true}\n", "model_init_kwargs", "trust_remote_code"),
        ("generation_kwargs: {custom_generate: someone/loop}\n", "generation_kwargs", "custom_generate"),
    ],
)
def test_code_that_a_yaml_file_names_is_refused(yaml_file, capsys, tmp_path, monkeypatch, text, option, named):
    (tmp_path / "own_metric").mkdir()  # which `evaluate` would take for the metric
    monkeypatch.chdir(tmp_path)
    path = yaml_file(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\n{text}")
    with pytest.raises(SystemExit) as exit:
        make_parser("train").parse_args_and_config(["--config", path])
    assert exit.value.code == 2
    assert f"`{option}` in the YAML file has {named!r}, and a file does not run code" in capsys.readouterr().err


def test_code_that_the_command_line_names_or_trusts_is_allowed(yaml_file, tmp_path):
    own = f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\n"
    path = yaml_file(f"{own}reward_funcs: my_rewards.brevity\n")
    assert make_parser().parse_args_and_config(["--config", path, "--trust_remote_code"])[0].reward_funcs
    overridden = ["--config", path, "--reward_funcs", "my_rewards.length"]
    assert make_parser().parse_args_and_config(overridden)[0].reward_funcs == ["my_rewards.length"]
    path = yaml_file(
        f"{own}reward_funcs: [accuracy_reward, 'evaluate:exact_match']\ntask: reasoning_gym:mini_sudoku\n"
    )
    assert make_parser().parse_args_and_config(["--config", path])[0].task == "reasoning_gym:mini_sudoku"
    path = yaml_file(f"{own}agent: my_agent.solve\n")
    with pytest.raises(SystemExit):
        make_parser().parse_args_and_config(["--config", path, "--trust_remote_code", "false"])
