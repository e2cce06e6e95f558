"""`es-trainer compare`"""

from dataclasses import dataclass

from ..report.runs import Run, differing
from ..scripts.arguments import Parser


@dataclass
class CompareArguments:
    """Arguments of `es-trainer compare`: the folders of the runs."""


def main(argv: list[str]) -> None:
    """Print in what runs differ, and what came of them."""
    from rich.console import Console
    from rich.table import Table

    parser = Parser(CompareArguments, prog="es-trainer compare")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="Output folder of a run, finished or not.")
    _, positional = parser.parse_args_and_config(argv)
    runs = [Run.read(folder, folder) for folder in positional.runs]
    table = Table()
    for title in ("", *positional.runs):
        table.add_column(title, overflow="fold")
    for name, values in differing(runs).items():
        table.add_row(name, *("-" if value is None else str(value) for value in values))
    table.add_section()
    for name, values in _results(runs).items():
        table.add_row(name, *values)
    Console().print(table)


def _results(runs: list[Run]) -> dict[str, list[str]]:
    held_out = [run.held_out() for run in runs]
    rows = {"steps": [f"{_last(run):,}" for run in runs]}
    for name in dict.fromkeys(name for found in held_out for name in found):
        columns = [[value for _, value in found.get(name, [])] for found in held_out]
        rows[f"{name}: first"] = [_number(column[:1]) for column in columns]
        rows[f"{name}: best"] = [_number(column) for column in columns]
        rows[f"{name}: last"] = [_number(column[-1:]) for column in columns]
    rows["reward of members: last"] = [_number([value for _, value in run.column("reward")][-1:]) for run in runs]
    rows["tokens"] = [f"{run.spent('tokens')(_last(run)):,.0f}" for run in runs]
    rows["hours"] = [f"{run.spent('hours')(_last(run)):.3g}" for run in runs]
    return rows


def _last(run: Run) -> int:
    return max((log["step"] for log in run.logs), default=0)


def _number(values: list[float]) -> str:
    """The highest of the values."""
    return f"{max(values):.4g}" if values else "-"
