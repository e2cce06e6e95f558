"""`es-trainer plot`"""

from dataclasses import dataclass, field
from pathlib import Path

from ..report.curves import plot_metric
from ..report.plots import plot_rewards, read_run
from ..report.runs import AXES, Run
from ..scripts.arguments import Parser


@dataclass
class PlotArguments:
    """
    Arguments of `es-trainer plot`, beside the folders of the runs.

    Args:
        output (`str`, *optional*, defaults to `"reward.png"`):
            Picture to write; its suffix says in which format.
        metric (`str`, *optional*):
            The metric to draw, such as `"eval_reward"` or `"signal"`. If `None`, the rewards of members and of
            held-out prompts.
        x (`str`, *optional*, defaults to `"steps"`):
            Over what: `"steps"`, `"tokens"`, `"hours"` or `"completions"`.
        smooth (`int`, *optional*, defaults to `1`):
            Values that are averaged: each one with those before it.
    """

    output: str = field(default="reward.png", metadata={"help": "Picture to write."})
    metric: str | None = field(
        default=None, metadata={"help": "Metric to draw. If `None`, rewards of members and of held-out prompts."}
    )
    x: str = field(default="steps", metadata={"help": "Over what to draw.", "choices": list(AXES)})
    smooth: int = field(default=1, metadata={"help": "Values that are averaged: each one with those before it."})


def main(argv: list[str]) -> None:
    """Draw the rewards of runs."""
    parser = Parser(PlotArguments, prog="es-trainer plot")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="Output folder of a run, finished or not.")
    arguments, positional = parser.parse_args_and_config(argv)
    folders = [Path(run).resolve() for run in positional.runs]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = positional.runs
    if arguments.smooth < 1:
        raise ValueError(f"`smooth={arguments.smooth}` is not valid: it must be at least 1.")
    if (arguments.metric, arguments.x, arguments.smooth) == (None, "steps", 1):
        plot_rewards(dict(zip(names, map(read_run, folders), strict=True)), arguments.output)
        print(f"Rewards are plotted in {arguments.output}.")
        return
    metric = arguments.metric or "reward"
    runs = [Run.read(folder, name) for folder, name in zip(folders, names, strict=True)]
    plot_metric(runs, arguments.output, metric, arguments.x, arguments.smooth)
    print(f"The metric {metric} is plotted in {arguments.output}.")
