"""The command `es-trainer`."""

import sys
from argparse import ArgumentParser
from importlib import import_module


# Each is a module here with a `main(argv)`, imported when it is the one to run
COMMANDS = {
    "train": "train a model, on one process or through accelerate on several",
    "eval": "score a model, or compare two, on a task or dataset",
    "generate": "answer prompts with a model, or with two side by side",
    "replay": "rebuild a trained model from its base model and the history of its run",
    "vllm-serve": "start a vLLM server that evaluates members for a trainer elsewhere",
    "plot": "draw the rewards of runs into one picture",
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
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser("es-trainer", description="Fine-tune language models with evolution strategies.")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_args(argv[:1]).command
    if command is None:
        parser.print_help()
        return 0
    import_module(f".{command.replace('-', '_')}", __name__).main(argv[1:])
    return 0
