"""The package as it is built and installed."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from es_trainer import __version__
from es_trainer.scripts.recipes import recipes


ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """What is built from a copy of the tree: the sdist, a wheel, and the wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("es_trainer", "tests"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    # What the build needs and nothing else, once for all three: a build that is isolated installs it each time
    needed = tomllib.loads((source / "pyproject.toml").read_text())["build-system"]["requires"]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "--target", folder / "needed", *needed], check=True)
    environment = ENVIRONMENT | {"PYTHONPATH": str(folder / "needed")}

    def wheel(name: str, origin: Path) -> Path:
        command = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / name, origin]
        subprocess.run(command, env=environment, check=True)
        (file,) = (folder / name).iterdir()
        return file

    of_tree = wheel("of_tree", source)
    hook = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", hook], cwd=source, env=environment, stdout=subprocess.DEVNULL, check=True)
    (sdist,) = folder.glob("es_trainer-*.tar.gz")
    return {"sdist": sdist, "wheel": of_tree, "wheel of the sdist": wheel("of_sdist", sdist)}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The folder of the programs of a venv with the wheel of the sdist, beside the packages of this one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    command = ["-m", "pip", "install", "--quiet", "--no-deps", built["wheel of the sdist"]]
    subprocess.run([folder / "bin" / "python", *command], env=ENVIRONMENT, check=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    # What it needs is here already. A line of a `.pth` file is a folder whose own `.pth` files are not read, so that
    # this checkout, which is installed there, is not in the way
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(installed: Path, *command: str) -> str:
    done = subprocess.run(
        [installed / command[0], *command[1:]], cwd=installed, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_sdist_has_what_the_wheel_needs(built):
    of_tree = contents(built["wheel"])
    assert contents(built["wheel of the sdist"]) == of_tree
    folders = os.walk(ROOT / "es_trainer", followlinks=True)
    files = {str(Path(folder, name).relative_to(ROOT)) for folder, _, names in folders for name in names}
    assert {name for name in of_tree if ".dist-info/" not in name} == {
        name for name in files if "__pycache__" not in name
    }


def test_the_sdist_has_no_tests(built):  # by itself, the build takes some of them and not what they share
    with tarfile.open(built["sdist"]) as archive:
        folders = {name.split("/")[1] for name in archive.getnames() if name.count("/") > 1}
    assert folders == {"es_trainer", "es_trainer.egg-info"}


def test_the_wheel_is_what_is_imported(installed):
    code = (
        "import es_trainer, importlib.metadata; print(es_trainer.__file__, importlib.metadata.version('es_trainer'))"
    )
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
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == __version__
    assert re.search(r"^## (.*: )?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[2] == __version__


def test_lower_bounds_are_the_oldest_versions_that_are_tested():
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(line) for line in project["dependencies"]]
    assert {requirement.name for requirement in needed} <= set(oldest)
    for extra in project["optional-dependencies"].values():
        needed += [requirement for requirement in map(Requirement, extra) if requirement.name in oldest]
    for requirement in needed:
        (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
        assert Version(bound) == Version(oldest[requirement.name]), requirement.name
