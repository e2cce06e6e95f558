"""Processes, started by `accelerate launch`."""

import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

from .mistakes import suggestion


CONFIGS = Path(__file__).parents[1] / "accelerate_configs"


def launch_parser() -> ArgumentParser:
    """That of `accelerate launch`, and `--accelerate_config`."""
    from accelerate.commands.launch import launch_command_parser  # imports torch

    parser = launch_command_parser()
    parser.add_argument("--accelerate_config")
    return parser


def launch_options() -> set[str]:
    """Every option of `accelerate launch`, and `--accelerate_config`."""
    return {option for option in launch_parser()._option_string_actions if option not in ("-h", "--help")}


def accelerate_configs() -> dict[str, Path]:
    """The files that come with this package, by name."""
    return {file.stem: file for file in sorted(CONFIGS.glob("*.yaml"))}


def find_accelerate_config(name: str) -> Path:
    """
    Args:
        name (`str`):
            A path, or the name of one of `accelerate_configs()`.

    Raises:
        `ValueError`: If it is neither.
    """
    configs = accelerate_configs()
    if Path(name).is_file():
        return Path(name)
    if name not in configs:
        raise ValueError(
            f"`accelerate_config={name!r}` is neither a file nor one of {', '.join(configs)}"
            f"{suggestion(name, configs)}"
        )
    return configs[name]


def from_yaml(left_over: list[str]) -> list[str]:
    """Options and values that a YAML file had, as a command line has them."""
    flags = {name for name, action in launch_parser()._option_string_actions.items() if action.nargs == 0}
    args = []
    for option, value in zip(left_over[::2], left_over[1::2], strict=True):
        if option not in flags:
            args += [option, value]
        elif value == "True":
            args.append(option)
    return args


def launch(script: str, script_args: list[str], launch_args: list[str]) -> None:
    """
    Run a script as `accelerate launch` does.

    Args:
        script (`str`):
            Path of the script.
        script_args (`list[str]`):
            Its options.
        launch_args (`list[str]`):
            Options of `accelerate launch`, and `--accelerate_config`.

    Raises:
        `SystemExit`: If the script fails, and with its exit status if it is one process.
        `ValueError`: If `launch_args` has a value that belongs to no option, or an `--accelerate_config` that does
            not exist.
    """
    import torch
    from accelerate.commands.config import default_config_file
    from accelerate.commands.launch import launch_command

    if not launch_args and torch.cuda.device_count() <= 1 and not os.path.isfile(default_config_file):
        # Nothing to launch, for which accelerate would set OMP_NUM_THREADS=1 and hide the exit status
        status = subprocess.run([sys.executable, script, *script_args]).returncode
        if status != 0:
            raise SystemExit(status)
        return
    args = launch_parser().parse_args([*launch_args, script, *script_args])
    if args.training_script != script:
        raise ValueError(f"{args.training_script!r} belongs to no option. Options are given as --name value.")
    if args.accelerate_config is not None:
        args.config_file = str(find_accelerate_config(args.accelerate_config))
    args.quiet = True  # the script's own error is enough
    launch_command(args)
