"""`es-trainer recipes`"""

from argparse import ArgumentParser


def main(argv: list[str]) -> None:
    """Print the recipes that come with this package."""
    ArgumentParser(
        "es-trainer recipes",
        description="List the recipes for `es-trainer train --recipe NAME`: settings of runs, by task and model.",
    ).parse_args(argv)
    from ..scripts.recipes import recipes

    found = recipes()
    width = max(map(len, found))
    for name, file in found.items():
        print(f"{name:{width}}  {file.read_text().splitlines()[0].removeprefix('# ')}")
