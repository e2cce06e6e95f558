"""Completions that are logged: in the terminal, in Parquet files, on trackers and on the Hub."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from huggingface_hub import CommitScheduler, DatasetCard, DatasetCardData, create_repo
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..config import ESConfig
from ..images import as_bytes, images_of, text_of, without_images
from ..rewards.scorer import distinct
from ..rollout import Rollout
from ..run.processes import Processes


if TYPE_CHECKING:
    import pandas


FOLDER = "completions"
CARD = """---
{{ card_data }}
---

# Completions

What {% if hub_model_id %}[{{ hub_model_id }}](https://huggingface.co/{{ hub_model_id }}){% else %}a model{% endif %} \
answered while it was trained with evolution strategies, a file for each logged step: the completions of the step's
best member, their rewards, and how much this member weighs in the update (`advantage`).
"""


class CompletionsLog:
    """
    Where logged completions go: the terminal, Parquet files in the output folder, trackers, a repository on the Hub.

    Args:
        args ([`ESConfig`]):
            Says where.
    """

    def __init__(self, args: ESConfig):
        self.args = args
        self.folder = Path(args.output_dir) / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scheduler: CommitScheduler | None = None
        if args.log_completions_hub_repo is not None:
            self.scheduler = self._schedule_uploads(args.log_completions_hub_repo)

    def _schedule_uploads(self, name: str) -> CommitScheduler:
        token, private = self.args.hub_token, self.args.hub_private_repo
        repository = create_repo(name, repo_type="dataset", private=private, token=token, exist_ok=True).repo_id
        data = DatasetCardData(pretty_name="Completion logs", tags=["es-trainer", "completions"])
        card = DatasetCard.from_template(data, template_str=CARD, hub_model_id=self.args.hub_model_id)
        card.push_to_hub(repository, token=token)
        return CommitScheduler(
            repo_id=repository,
            repo_type="dataset",
            folder_path=self.folder,
            every=2,  # minutes
            allow_patterns=["*.parquet"],
            token=token,
        )

    def write(
        self,
        step: int,
        prompts: list[Any],
        completions: list[Any],
        columns: list[tuple[str, list[Any]]],
        advantage: float,
        callbacks: list[TrainerCallback],
    ) -> None:
        """
        Log the completions of a step.

        Args:
            step (`int`):
                Number of the step.
            prompts (`list`):
                Texts or lists of messages.
            completions (`list`):
                Texts or lists of messages.
            columns (`list[tuple[str, list]]`):
                Names and values of what is known of each completion. Where a name is taken, a number is added to it.
                Values that do not fit one type of Parquet are kept as text.
            advantage (`float`):
                How much the member weighs in the update.
            callbacks (`list[TrainerCallback]`):
                Those of the trainer, of which some belong to trackers.
        """
        images = []
        if self.args.log_multimodal:  # with those that tools have returned
            images = [images_of(p) + images_of(c) for p, c in zip(prompts, completions, strict=True)]
        prompts, completions = list(map(without_images, prompts)), list(map(without_images, completions))
        names = distinct(["step", "prompt", "completion", "advantage", *(name for name, _ in columns)])[4:]
        table = {
            "prompt": prompts,
            "completion": completions,
            **{name: values for name, (_, values) in zip(names, columns, strict=True)},
            "advantage": [advantage] * len(prompts),
        }
        print_completions(f"Step {step}: completions of the best member", table, self.args.num_completions_to_print)
        arrays = {name: _array(values) for name, values in table.items()}
        logged = pyarrow.table({"step": [step] * len(prompts), **arrays})
        if any(images):
            logged = logged.append_column("images", pyarrow.array([list(map(as_bytes, some)) for some in images]))
        path = self.folder / f"completions_{step:05d}.parquet"
        with self.scheduler.lock if self.scheduler is not None else contextlib.nullcontext():
            pyarrow.parquet.write_table(logged, path)
        frame = logged.to_pandas()
        if any(images):
            frame["images"] = images
        for name, values in table.items():
            if frame[name].dtype.kind not in "biuf":  # trackers know numbers and texts
                frame[name] = [None if value is None else _text(value) for value in values]
        self._write_to_trackers(step, frame, callbacks)

    def _write_to_trackers(self, step: int, frame: "pandas.DataFrame", callbacks: list[TrainerCallback]) -> None:
        if self.args.log_unique_prompts:
            frame = frame[~frame["prompt"].duplicated()]
        # Imported where they are used: neither has to be installed
        if "wandb" in self.args.report_to:
            import wandb

            wandb.log({"completions": wandb.Table(dataframe=_with_images(frame, wandb.Image))})
        if "trackio" in self.args.report_to:
            import trackio

            trackio.log({"completions": trackio.Table(dataframe=_with_images(frame, trackio.Image))})
        frame = frame.drop(columns="images", errors="ignore")
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.tb_writer.add_text("completions", _markdown(frame.columns, frame.values.tolist()), step)


class BestCompletions:
    """
    Logs what the best member of a step answered, wherever it was evaluated.

    Args:
        args ([`ESConfig`]):
            Says whether and where.
        processes ([`Processes`]):
            Those of the run.
        reward_names (`list[str]`):
            Names of the reward functions.
    """

    def __init__(self, args: ESConfig, processes: Processes, reward_names: list[str]):
        self.enabled = args.log_completions
        self.processes = processes
        self.reward_names = reward_names
        self._log = CompletionsLog(args) if args.log_completions and processes.rank == 0 else None
        self._rollouts: dict[int, Rollout] = {}  # of the members that this process evaluated in the last step
        self._best, self._utility = 0, 0.0

    def begin_step(self) -> None:
        """Forget the members of the step before."""
        self._rollouts = {}

    def keep(self, member: int, rollout: Rollout) -> None:
        """Keep what a member answered, in case it is the best one."""
        if self.enabled:
            self._rollouts[member] = rollout

    def choose(self, utilities: np.ndarray) -> None:
        """Say how much each member weighs in the update."""
        self._best = int(np.argmax(utilities))
        self._utility = float(utilities[self._best])

    def _rollout(self) -> Rollout | None:
        """No more of the best member than is logged, and nothing that can't be sent."""
        rollout = self._rollouts.get(self._best)
        if rollout is None:
            return None
        extra = {name: plain(values) for name, values in rollout.scores.extra.items()}
        prompts = [{"prompt": row["prompt"]} for row in rollout.rows]
        return replace(rollout, rows=prompts, scores=replace(rollout.scores, extra=extra))

    def write(self, step: int, callbacks: list[TrainerCallback]) -> None:
        """Log the best member of the last step, on all processes; nothing if the step was repeated without members."""
        if not self.enabled:
            return
        replies = self.processes.exchange(self._rollout)
        rollouts = [rollout for rollout in replies if rollout is not None]
        if self._log is None or not rollouts:
            return
        # Where processes share out the prompts of a member, their functions may have logged different columns
        extra: dict[str, list[Any]] = {name: [] for rollout in rollouts for name in rollout.scores.extra}
        for rollout in rollouts:
            for name, values in extra.items():
                values += rollout.scores.extra.get(name, [None] * len(rollout.rows))
        rewards = np.concatenate([rollout.scores.by_function for rollout in rollouts])
        self._log.write(
            step,
            [row["prompt"] for rollout in rollouts for row in rollout.rows],
            [message for rollout in rollouts for message in rollout.messages],
            [*zip(self.reward_names, rewards.T.tolist(), strict=True), *extra.items()],
            self._utility,
            callbacks,
        )


def _with_images(frame: "pandas.DataFrame", image: Callable[[Any], Any]) -> "pandas.DataFrame":
    """The table with the images of each row as a tracker shows them."""
    if "images" not in frame:
        return frame
    return frame.assign(images=[list(map(image, some)) for some in frame["images"]])


def print_completions(title: str, table: dict[str, list[Any]], limit: int | None = None) -> None:
    """
    Print a table of prompts and completions.

    Args:
        title (`str`):
            Title of the table.
        table (`dict[str, list]`):
            Columns `prompt` and `completion` (texts or lists of messages) and any others; numbers are rounded.
        limit (`int`, *optional*):
            Number of rows to print. `None` prints all.
    """
    printed = Table(show_lines=True, expand=True)
    printed.add_column("Prompt", style="bright_yellow")
    printed.add_column("Completion", style="bright_green")
    for name in list(table)[2:]:
        printed.add_column(Text(_text(name)), style="bold cyan", justify="right")
    for prompt, completion, *others in list(zip(*table.values(), strict=True))[:limit]:
        printed.add_row(Text(_text(prompt)), Text(_text(completion)), *(Text(_cell(other)) for other in others))
    Console().print(Panel(printed, title=title, border_style="bold white"))


def plain(values: list[Any]) -> list[Any]:
    """The values as they are kept in Parquet: of one type, or texts."""
    return _array(values).to_pylist()


def _array(values: list[Any]) -> pyarrow.Array:
    """The values in a type that Parquet has; as texts if there is none that all of them are of."""
    values = [value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value for value in values]
    try:
        array = pyarrow.array(values)
        pyarrow.parquet.write_table(pyarrow.table({"values": array}), io.BytesIO())  # some types can't be written
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        array = pyarrow.array([None if value is None else _text(value) for value in values], pyarrow.string())
    return array


def _text(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(message, dict) and "role" in message for message in value):
        value = "\n".join(f"{message['role']}: {_content(message)}" for message in value)
    # Lone surrogates, as JSON may have, are no text that can be printed or stored
    return str(value).encode(errors="replace").decode()


def _content(message: dict[str, Any]) -> str:
    """Text of a message; other parts than text by their kind. Tool calls stand as they are."""
    content = message.get("content")
    content = content if content is None else text_of(content)
    return " ".join(str(part) for part in (content, message.get("tool_calls")) if part)


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else _text(value)


def _markdown(names: Any, rows: list[list[Any]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    cells = ([_cell(value).replace("|", "\\|").replace("\n", "<br>") for value in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
