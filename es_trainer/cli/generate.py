"""`es-trainer generate`"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..scripts.arguments import GenerationArguments, Parser


if TYPE_CHECKING:
    from ..config import ESConfig


@dataclass
class GenerateArguments(GenerationArguments):
    """
    Arguments of `es-trainer generate`, beside those of [`GenerationArguments`].

    Args:
        prompts (`list[str]`, *optional*):
            Prompts.
        prompts_file (`str`, *optional*):
            File with a prompt on each line.
        chat_template (`bool`, *optional*, defaults to `True`):
            Whether prompts are messages of a user, if the tokenizer has a chat template. Otherwise they are text to go
            on from.
    """

    prompts: list[str] | None = field(default=None, metadata={"help": "Prompts."})
    prompts_file: str | None = field(default=None, metadata={"help": "File with a prompt on each line."})
    chat_template: bool = field(
        default=True,
        metadata={"help": "Whether prompts are messages of a user, if the tokenizer has a chat template."},
    )

    def __post_init__(self):
        if bool(self.prompts) == (self.prompts_file is not None):
            raise ValueError("Give either `prompts` or `prompts_file`.")


def main(argv: list[str]) -> None:
    """Print a table of prompts and completions."""
    (arguments,) = Parser(GenerateArguments, prog="es-trainer generate").parse_args_and_config(argv)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    prompts, completions = generate(arguments)
    table = Table(show_lines=True, expand=True)
    for title in ("Prompt", *arguments.models):
        table.add_column(title, overflow="fold")
    for row in zip(prompts, *completions, strict=True):
        table.add_row(*map(Text, row))
    Console().print(table)


def generate(arguments: GenerateArguments) -> tuple[list[str], list[list[str]]]:
    """
    Complete prompts.

    Args:
        arguments ([`GenerateArguments`]):
            Models, prompts and how to generate.

    Returns:
        `tuple`: The prompts, and the completions of the model to compare with, if there is one, and of the model.

    Raises:
        `ValueError`: If something given cannot work.
    """
    config = arguments.to_config()
    prompts = arguments.prompts
    if arguments.prompts_file is not None:
        prompts = [line for line in Path(arguments.prompts_file).read_text().splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"`prompts_file={arguments.prompts_file!r}` has no lines.")
    return prompts, [_complete(name, prompts, config, arguments) for name in arguments.models]


def _complete(name: str, prompts: list[str], config: "ESConfig", arguments: GenerateArguments) -> list[str]:
    from ..scripts.data import with_system_prompt
    from .generation import Generator

    generator = Generator(name, config)
    inputs: list[Any] = prompts
    if arguments.chat_template and generator.tokenizer.chat_template is not None:
        inputs = [[{"role": "user", "content": prompt}] for prompt in prompts]
    if arguments.system_prompt is not None:
        inputs = [with_system_prompt(prompt, arguments.system_prompt) for prompt in inputs]
    return [completion.text for completion in generator.answer(inputs)]
