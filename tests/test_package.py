"""The package as it is built and installed."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from es_trainer import __version__
from es_trainer.scripts.recipes import recipes


ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of the programs of a venv in which the wheel is installed, beside the packages of this one."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "es_trainer", source / "es_trainer", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("es_trainer-*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], env=ENVIRONMENT, check=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # What it needs is here already. A line of a `.pth` file is a folder whose own `.pth` files are not read, so that
    # this checkout, which is installed there, is not in the way
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin"


def run(installed: Path, *command: str) -> str:
    done = subprocess.run(
        [installed / command[0], *command[1:]], cwd=installed, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_is_what_is_imported(installed):
    code = "import es_trainer; print(es_trainer.__file__, es_trainer.__version__)"
    file, version = run(installed, "python", "-c", code).split()
    assert Path(file).is_relative_to(installed.parent) and version == __version__


def test_recipes_are_in_the_wheel(installed):
    listed = [line.split()[0] for line in run(installed, "es-trainer", "recipes").splitlines()]
    assert listed == list(recipes()) and "countdown/qwen2.5-0.5b-instruct" in listed


def test_a_recipe_is_found_by_its_name(installed):
    command = ["train", "--recipe", "smollm2/conciseness", "--model_name_or_path", "./nowhere"]
    done = subprocess.run(
        [installed / "es-trainer", *command], cwd=installed, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "'./nowhere'" in done.stderr  # all else that the recipe says was taken


def test_versions_are_the_same_everywhere():
    assert re.search(r'version="(.*)"', (ROOT / "setup.py").read_text())[1] == __version__
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == __version__
    assert f" {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
