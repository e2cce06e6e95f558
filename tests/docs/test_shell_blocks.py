"""Commands in README.md and docs/*.md: the real parsers take their options, and a slow test runs them."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import save_tiny
from pages import BLOCKS, PAGES, ROOT, Block, inline_of

from es_trainer.cli import COMMANDS, main
from es_trainer.engines import vllm_version
from es_trainer.scripts.arguments import Parser
from es_trainer.scripts.launch import launch_parser


SHELL = [block for block in BLOCKS if block.language == "bash"]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
VARIABLE = re.compile(r"(?:export )?\w+=.*")
# For the commands that train
SHORT = "--use_cpu true --bf16 false --population_size 4 --num_prompts_per_step 2 --max_completion_length 8".split()
SHORT += ["--max_steps", "4"]
# The pages whose commands begin with what those of an earlier page have made
ORDER = "command_line quickstart extending monitoring evaluation checkpoints tuning".split()


class Parsed(BaseException):
    """The options were taken; nothing is done with them."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


@pytest.fixture
def folder(tmp_path, monkeypatch, model) -> Path:
    """A folder with the files that are in pages, in which commands run; `$BASE` is a tiny model."""
    for block in BLOCKS:
        if block.file:
            (tmp_path / block.file).write_text(block.code.replace(MODEL, model))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("BASE", model)
    return tmp_path


def commands_of(block: Block) -> Iterator[list[str]]:
    """The commands of a block, without assignments of variables."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if not VARIABLE.fullmatch(line):
            words = shlex.split(os.path.expandvars(line), comments=True)
            if words:
                yield words


def check(command: list[str], monkeypatch) -> None:
    name, *arguments = command
    if name == "es-trainer":
        parse(arguments, monkeypatch)
    elif name == "accelerate":
        assert (ROOT / launch_parser().parse_known_args(arguments[1:])[0].config_file).is_file()
    elif name == "make":
        assert re.search(f"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif name == "pip":
        for extra in re.findall(r"\w+(?=[],])", " ".join(arguments)):
            assert is_extra(extra)
    elif name == "pytest":
        assert (ROOT / arguments[0]).exists()
    elif name == "python":
        assert arguments[0] == "-m" or (ROOT / arguments[0]).is_file()
    else:
        pytest.fail(f"Nothing checks the command {name!r}: say here how.")


def parse(arguments: list[str], monkeypatch) -> None:
    """Let a command take its options, and do no more."""

    def stop(*found, **options):
        raise Parsed

    def parse_and_stop(self, *args, parse=Parser.parse_args_and_config, **options):
        parse(self, *args, **options)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args_and_config", parse_and_stop)
        patch.setattr(vllm_version, "check_version", stop)
        if arguments[0] in ("recipes", "env"):  # which have no options
            assert arguments[1:] == []
            return
        with pytest.raises(Parsed):
            main(arguments)


def is_extra(name: str) -> bool:
    """Whether the package has an extra, wherever it declares its extras."""
    declared = "".join((ROOT / file).read_text() for file in ("setup.py", "pyproject.toml"))
    return re.search(rf'^ *"?{name}"?(: | = )\[', declared, re.MULTILINE) is not None


def test_extras_of_the_installation_page_exist():
    extras = re.findall(r"^\| `(\w+)` \|", PAGES["installation.md"].read_text(), re.MULTILINE)
    assert len(extras) > 5 and [name for name in extras if not is_extra(name)] == []


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.page}:{block.line}")
def test_options_are_taken(folder, monkeypatch, block):
    for command in commands_of(block):
        check(command, monkeypatch)


def test_files_and_targets_within_texts_exist():
    for page in PAGES:
        for code in inline_of(page):
            program, *rest = code.split()
            if program == "make" and rest:
                assert re.search(f"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (page, code)
            elif program == "python" and rest and rest[0].endswith(".py"):
                assert (ROOT / rest[0]).is_file(), (page, code)
            elif program == "es-trainer" and rest and not rest[0].isupper():
                assert rest[0] in COMMANDS, (page, code)


def test_languages_are_known():
    """A block in another language would be looked at by no test."""
    assert {block.language for block in BLOCKS} <= {"python", "bash", "yaml", "diff", "text"}
    assert [block for block in BLOCKS if block.language == "yaml" and not block.file] == []


@pytest.mark.slow
def test_commands_run(folder):
    pages = [block.page for block in SHELL if any(command[0] == "es-trainer" for command in commands_of(block))]
    assert set(pages) - {"vllm.md", "installation.md"} == {f"{name}.md" for name in ORDER}
    for page in (f"{name}.md" for name in ORDER):
        for block in SHELL:
            for program, *arguments in commands_of(block) if block.page == page else ():
                if program == "es-trainer":
                    trains = arguments[0] in ("train", "probe")
                    assert main([*arguments, *SHORT] if trains else arguments) == 0
    for name in ("reward.png", "tokens.png", "signal.png", "eval.json", "probe/probe.png"):
        assert (folder / name).stat().st_size > 0
    for name in ("brief", "briefer", "periods", "rebuilt", "best/member-2"):
        assert list((folder / name).glob("*model.safetensors"))
