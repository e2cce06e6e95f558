"""The Dockerfiles, as far as they can be followed without Docker: what they copy, and what pip would install."""

import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def instructions(file: Path) -> list[tuple[str, str]]:
    """Each instruction's name and what follows it, with the defaults of its arguments filled in."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    arguments, found = {}, []
    for line in "\n".join(lines).replace("\\\n", "").splitlines():
        if line:
            name, rest = line.split(maxsplit=1)
            rest = string.Template(rest).safe_substitute(arguments)
            if name == "ARG" and "=" in rest:
                arguments.update([rest.split("=")])
            found.append((name, rest))
    return found


def copy(rest: str, context: Path) -> None:
    """What COPY does."""
    *sources, target = shlex.split(rest)
    for source in sources:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, context / target, symlinks=True)
        else:
            shutil.copy(ROOT / source, context / target)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_installed_was_copied(file, tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs = 0
    for name, rest in instructions(file):
        if name == "COPY":
            copy(rest, tmp_path)
        if name == "RUN" and rest.startswith("pip install"):
            installs += 1
            _, _, option, constraints, requirement = shlex.split(rest)
            assert option == "--constraint" and (tmp_path / constraints).is_file()
            if requirement.startswith("."):
                extras = re.fullmatch(r"\.\[(.*)\]", requirement)[1].split(",")
                assert set(extras) <= set(project["optional-dependencies"])
                assert all((tmp_path / path).exists() for path in ("pyproject.toml", "LICENSE", "README.md"))
                assert (tmp_path / "es_trainer" / "recipes" / "accelerate_configs" / "zero3.yaml").is_file()
    assert installs == 2
    assert ("ENTRYPOINT", '["es-trainer"]') in instructions(file) and "es-trainer" in project["scripts"]


def test_vllm_is_that_of_the_other_tests():
    (version,) = re.findall(r"^VLLM := (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert ("ARG", f"VLLM={version}") in instructions(ROOT / "docker" / "cuda-vllm.Dockerfile")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_pip_finds_versions_that_fit_together(file, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for name, rest in instructions(file):
        if name == "COPY":
            copy(rest, tmp_path)
        if name == "RUN" and rest.startswith("pip install"):
            command = [sys.executable, "-m", *shlex.split(rest), "--dry-run", "--ignore-installed"]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    assert "es-trainer-" in done.stdout.splitlines()[-1]
