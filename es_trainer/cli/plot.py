"""`es-trainer plot`"""

from dataclasses import dataclass, field
from pathlib import Path

from ..report.plots import plot_rewards, read_run
from ..scripts.arguments import Parser


@dataclass
class PlotArguments:
    """
    Arguments of `es-trainer plot`, beside the folders of the runs.

    Args:
        output (`str`, *optional*, defaults to `"reward.png"`):
            Picture to write; its suffix says in which format.
    """

    output: str = field(default="reward.png", metadata={"help": "Picture to write."})


def main(argv: list[str]) -> None:
    """Draw the rewards of runs."""
    parser = Parser(PlotArguments, prog="es-trainer plot")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="Output folder of a run, finished or not.")
    arguments, positional = parser.parse_args_and_config(argv)
    folders = [Path(run).resolve() for run in positional.runs]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = positional.runs
    plot_rewards(dict(zip(names, map(read_run, folders), strict=True)), arguments.output)
    print(f"Rewards are plotted in {arguments.output}.")
