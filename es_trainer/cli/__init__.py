"""The command `es-trainer`."""

import os
import sys
from argparse import ArgumentParser
from importlib import import_module

from .. import __version__
from ..scripts.mistakes import DEBUG, error_in_one_line


# Each is a module here with a `main(argv)`, imported when it is the one to run
COMMANDS = {
    "train": "train a model, on one process or through accelerate on several",
    "probe": "find sigma, the learning rate and what a run costs, before it",
    "eval": "score a model, or compare two, on a task or dataset",
    "generate": "answer prompts with a model, or with two side by side",
    "replay": "rebuild a trained model from its base model and the history of its run",
    "recipes": "list the settings of runs that come with this package",
    "vllm-serve": "start a vLLM server that evaluates members for a trainer elsewhere",
    "plot": "draw the rewards of runs into one picture",
    "compare": "print in what runs differ, and what came of them",
    "env": "print versions and devices, for bug reports",
}


def main(argv: list[str] | None = None) -> int:
    """
    Run a command.

    Args:
        argv (`list[str]`, *optional*):
            The command and its options. If `None`, those of the command line.

    Returns:
        `int`: The exit status.

    Raises:
        `SystemExit`: With status 2 and one line on stderr, if something given is wrong.
    """
    argv = _take_debug(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser("es-trainer", description="Fine-tune language models with evolution strategies.")
    parser.add_argument("--version", action="version", version=f"es-trainer {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_args(argv[:1]).command
    if command is None:
        parser.print_help()
        return 0
    with error_in_one_line(f"es-trainer {command}"):
        import_module(f".{command.replace('-', '_')}", __name__).main(argv[1:])
    return 0


def _take_debug(argv: list[str]) -> list[str]:
    """The arguments without `--debug`. In `train`, with a value, it is an option of the Trainer."""
    kept = []
    for i, arg in enumerate(argv):
        value = argv[i + 1 : i + 2]
        of_the_trainer = argv[0] == "train" and value and not value[0].startswith("-")
        if arg == "--debug" and not of_the_trainer:
            os.environ[DEBUG] = "1"
        else:
            kept.append(arg)
    return kept
