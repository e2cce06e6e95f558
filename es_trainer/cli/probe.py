"""`es-trainer probe`"""

import math
import tempfile
from dataclasses import replace
from pathlib import Path


PICTURE = "probe.png"
HELP = """\
usage: es-trainer probe [--config FILE] [--OPTION VALUE ...]

Find sigma and the learning rate before a run, and what the run costs. The options are those of `es-trainer train`:
probe with the YAML file of the run. Sigmas from 1/8 of the given one to 8 times it are tried on one step's prompts,
then learning rates from 1/8 of the best sigma to 8 times it on the held-out prompts. No model is saved. The picture
probe.png is written into the output folder.
"""


def main(argv: list[str]) -> None:
    """Try sigmas and step lengths with the options of `es-trainer train`, on one process."""
    if {"-h", "--help"} & set(argv):
        print(HELP)
        raise SystemExit(0)
    from rich.console import Console

    from ..probe import Probe, config_of_probe
    from ..report import probe as report
    from ..report.console import duration, memory
    from ..schedules import total_of
    from ..scripts.es import make_parser, make_trainer

    parser = make_parser(prog="es-trainer probe")
    script_args, run, *others = parser.parse_args_and_config(argv)
    with tempfile.TemporaryDirectory() as folder:
        args = config_of_probe(replace(run, output_dir=folder))  # has evaluations, so that their data is loaded
        trainer = make_trainer(script_args, args, *others, trainer_class=Probe)
        found = trainer.run()
        steps = run.max_steps if run.max_steps > 0 else run.num_train_epochs * len(trainer.get_train_dataloader())
        members = run.population_size, run.population_size_schedule
        prompts = run.num_prompts_per_step, run.num_prompts_per_step_schedule
        completions = total_of(math.ceil(steps), members, prompts)
        populations = completions / (members[0] * prompts[0])  # of the size that was probed
        peak = memory() / 2**30
        trainer.end()
    console = Console()
    for table in report.tables(found):
        console.print(table)
    print(report.advice(found))
    if found.sigma is not None:
        print(
            f"# {steps:.0f} steps: {populations * found.sigma.tokens:,.0f} tokens, {found.sigma.seconds:.3g} s each, "
            f"{duration(populations * found.sigma.seconds)} without evaluations, {peak:.1f} GiB on one process"
        )
    picture = Path(run.output_dir) / PICTURE
    report.plot(found, picture)
    print(f"# The picture is {picture}.")
