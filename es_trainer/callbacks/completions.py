from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text


def print_completions(
    title: str,
    prompts: list[str] | list[list[dict[str, Any]]],
    completions: list[str] | list[list[dict[str, Any]]],
    columns: dict[str, list[Any]],
    limit: int | None = None,
) -> None:
    """
    Print a table of prompts and completions.

    Args:
        title (`str`):
            Title of the table.
        prompts (`list`):
            Texts or lists of messages.
        completions (`list`):
            Texts or lists of messages.
        columns (`dict[str, list]`):
            Further columns; numbers are rounded.
        limit (`int`, *optional*):
            Number of rows to print. `None` prints all.
    """
    table = Table(show_lines=True, expand=True)
    table.add_column("Prompt", style="bright_yellow")
    table.add_column("Completion", style="bright_green")
    for name in columns:
        table.add_column(name, style="bold cyan", justify="right")
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if limit is not None and row == limit:
            break
        table.add_row(_text(prompt), _text(completion), *(_cell(values[row]) for values in columns.values()))
    Console().print(Panel(table, title=title, border_style="bold white"))


def _text(entry: str | list[dict[str, Any]]) -> Text:
    if isinstance(entry, str):
        return Text(entry)
    return Text("\n".join(f"{message['role']}: {message['content']}" for message in entry))


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
