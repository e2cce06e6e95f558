"""What a person sees of a run: a sentence before the first step, one line for each log."""

import sys
from datetime import timedelta
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from ..config import ESConfig
from .progress import MemberProgressCallback


def show_progress(trainer: Trainer, args: ESConfig) -> None:
    """
    Let the trainer show members as they are done, and lines in place of dicts, where it shows those: in notebooks, it
    shows a table.
    """
    handler: CallbackHandler = trainer.callback_handler
    for shows_dicts, shows_lines in ((ProgressCallback, LineProgressCallback), (PrinterCallback, LineCallback)):
        if args.log_format == "line" and any(type(callback) is shows_dicts for callback in handler.callbacks):
            trainer.remove_callback(shows_dicts)
            trainer.add_callback(shows_lines)
    if not args.disable_tqdm:
        trainer.add_callback(MemberProgressCallback)


class Lines:
    """The lines of a run, as its logs come."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}  # reward, and those of held-out prompts, of the last log

    def before(self, args: ESConfig, state: TrainerState) -> Text:
        """What a run is going to do."""
        completions = args.population_size * args.num_prompts_per_step * args.num_generations
        several = f" x {args.num_generations} completions" if args.num_generations > 1 else ""
        step = f"{args.population_size} members x {args.num_prompts_per_step} prompts{several}"
        tokens = completions * args.max_completion_length
        return Text(f"{state.max_steps:,} steps of {step}: up to {tokens:,} new tokens a step.")

    def of(self, logs: dict[str, Any], args: ESConfig, state: TrainerState) -> Text | None:
        """The line of a log, or `None` if it is none of the trainer's."""
        if "train_runtime" in logs:
            return Text(f"{state.global_step:,} steps in {_time(logs['train_runtime'])}")
        held_out = [key for key in logs if key.startswith("eval_") and key.endswith("reward")]
        if "step_time" not in logs and not held_out:
            return None
        parts = [Text(f"step {state.global_step:,}/{state.max_steps:,}", style="bold")]
        parts += [self._reward(key, logs[key]) for key in (["reward"] if "step_time" in logs else held_out)]
        parts += [
            Text(f"{name} {logs[key]:.3g}")
            for key, name in (("reward/center", "center"), ("reward_std", "spread"), ("signal", "signal"))
            if logs.get(key) is not None
        ]
        if logs.get("step_time") is not None:
            left = (state.max_steps - state.global_step) * logs["step_time"]
            parts.append(Text(f"{logs['step_time']:.3g} s, {_time(left)} left", style="dim"))
            if state.global_step == args.logging_steps:  # of the first log
                parts.append(Text(f"{_memory() / 2**30:.1f} GiB", style="dim"))
        return Text("  ").join(parts)

    def _reward(self, key: str, value: float | None) -> Text:
        name = key.removesuffix("reward").removeprefix("eval_").strip("_")
        shown = "reward" if key == "reward" else f"held-out {name}".strip()
        if value is None:
            return Text(f"{shown} -")
        text = Text(f"{shown} {value:.4g}")
        if key in self.last:
            change = value - self.last[key]
            text.append(f" ({change:+.2g})", style="green" if change > 0 else "red" if change < 0 else "")
        self.last[key] = value
        return text


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _memory() -> int:
    """The most memory that was used, on the device or by this process, in bytes."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def _plain(text: Text) -> str:
    """The text with its colors where they can be seen."""
    console = Console(file=sys.stdout, soft_wrap=True)
    with console.capture() as capture:
        console.print(text, end="", highlight=False)
    return capture.get()


class LineCallback(TrainerCallback):
    """Prints lines."""

    def __init__(self) -> None:
        self.lines = Lines()

    def write(self, text: str) -> None:
        """Print."""
        print(text, flush=True)

    def on_train_begin(self, args: ESConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_local_process_zero:
            self.write(_plain(self.lines.before(args, state)))

    def on_log(
        self,
        args: ESConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_local_process_zero:
            line = self.lines.of(logs or {}, args, state)
            self.write(str(logs) if line is None else _plain(line))


class LineProgressCallback(ProgressCallback):
    """Prints lines above the bar."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = Lines()

    def on_train_begin(self, args: ESConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self.training_bar.write(_plain(self.lines.before(args, state)))

    def on_log(
        self,
        args: ESConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        line = self.lines.of(logs or {}, args, state)
        if line is None:
            super().on_log(args, state, control, logs=logs, **kwargs)
        elif self.training_bar is not None:
            self.training_bar.write(_plain(line))
