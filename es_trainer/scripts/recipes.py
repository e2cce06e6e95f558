"""Settings of runs that come with this package, as YAML files."""

from collections.abc import Iterable
from pathlib import Path

from .mistakes import suggestion


FOLDER = Path(__file__).parents[1] / "recipes"


def recipes() -> dict[str, Path]:
    """The files, by the names of their task and model: `"countdown/qwen2.5-0.5b-instruct"`."""
    files = sorted(FOLDER.glob("*/*.yaml"))
    return {f"{file.parent.name}/{file.stem}": file for file in files if file.parent.name != "accelerate_configs"}


def find_recipe(name: str) -> Path:
    """
    Args:
        name (`str`):
            One of `recipes()`.

    Raises:
        `ValueError`: If it is none.
    """
    known = recipes()
    if name not in known:
        raise ValueError(
            f"`recipe={name!r}` is none of those that come with es_trainer{suggestion(name, known)} `es-trainer "
            "recipes` lists them; a file of your own is given by --config."
        )
    return known[name]


def with_files(args: Iterable[str]) -> list[str]:
    """
    Options of a command line, with `--config` and the file of a recipe in place of `--recipe` and its name.

    Args:
        args (`Iterable[str]`):
            The options. `--config=FILE` and `--recipe=NAME` become two of them.

    Raises:
        `ValueError`: If there is no such recipe.
    """
    split = (arg.split("=", 1) if arg.startswith(("--config=", "--recipe=")) else [arg] for arg in args)
    found = [part for parts in split for part in parts]
    while "--recipe" in found[:-1]:
        at = found.index("--recipe")
        found[at : at + 2] = ["--config", str(find_recipe(found[at + 1]))]
    return found
