"""What a person sees of a run: a sentence before the first step, one line for each log."""

import sys
from abc import abstractmethod
from datetime import timedelta
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.utils import is_in_notebook

from ..config import ESConfig
from .plots import FIGURES, held_out_labels
from .progress import MemberProgressCallback


def show_progress(trainer: Trainer, args: ESConfig) -> None:
    """
    Let the trainer show members as they are done, lines in place of dicts, and in a notebook a table of rewards.
    """
    if args.log_format == "line":
        for theirs, ours in _callbacks().items():
            if any(type(callback) is theirs for callback in trainer.callback_handler.callbacks):
                trainer.remove_callback(theirs)
                trainer.add_callback(ours)
    if not args.disable_tqdm:
        trainer.add_callback(MemberProgressCallback)


def _callbacks() -> dict[type[TrainerCallback], type[TrainerCallback]]:
    """Those that show the logs of rewards, by those of Transformers that show any."""
    callbacks = {ProgressCallback: LineProgressCallback, PrinterCallback: LineCallback}
    if is_in_notebook():  # it needs IPython
        from transformers.utils.notebook import NotebookProgressCallback

        from .notebook import RewardTableCallback

        callbacks[NotebookProgressCallback] = RewardTableCallback
    return callbacks


class Lines:
    """The lines of a run, as its logs come."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}  # reward, and those of held-out prompts, of the last log

    def before(self, args: ESConfig, state: TrainerState) -> Text:
        """What a run is going to do."""
        completions = args.largest_population * args.largest_num_prompts * args.num_generations
        several = f" x {args.num_generations} completions" if args.num_generations > 1 else ""
        members = f"{args.population_size} members{_later(args.population_size_schedule)}"
        prompts = f"{args.num_prompts_per_step} prompts{_later(args.num_prompts_per_step_schedule)}"
        prompts += " of their own" * args.unique_prompts
        step = f"{members} x {prompts}{several}"
        tokens = completions * args.max_completion_length
        return Text(f"{state.max_steps:,} steps of {step}: up to {tokens:,} new tokens a step.")

    def of(self, logs: dict[str, Any], args: ESConfig, state: TrainerState) -> Text | None:
        """The line of a log, or `None` if it is none of the trainer's."""
        if "train_runtime" in logs:
            return Text(f"{state.global_step:,} steps in {duration(logs['train_runtime'])}")
        rewards = {"reward": "reward"} if "step_time" in logs else held_out_labels(logs)
        if not rewards:
            return None
        parts = [Text(f"step {state.global_step:,}/{state.max_steps:,}", style="bold")]
        parts += [self._reward(key, name, logs[key]) for key, name in rewards.items()]
        parts += [Text(f"{name} {logs[key]:.3g}") for key, name in FIGURES.items() if logs.get(key) is not None]
        if logs.get("step_time") is not None:
            left = (state.max_steps - state.global_step) * logs["step_time"]
            parts.append(Text(f"{logs['step_time']:.3g} s, {duration(left)} left", style="dim"))
            if state.global_step == args.logging_steps:  # of the first log
                parts.append(Text(f"{memory() / 2**30:.1f} GiB", style="dim"))
        return Text("  ").join(parts)

    def _reward(self, key: str, name: str, value: float | None) -> Text:
        if value is None:
            return Text(f"{name} -")
        text = Text(f"{name} {value:.4g}")
        if key in self.last:
            change = value - self.last[key]
            text.append(f" ({change:+.2g})", style="green" if change > 0 else "red" if change < 0 else "")
        self.last[key] = value
        return text


def _later(schedule: dict[int, int] | None) -> str:
    """What a setting becomes."""
    return "".join(f", {number} from step {steps + 1} on" for steps, number in (schedule or {}).items())


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    return str(timedelta(seconds=round(seconds)))


def memory() -> int:
    """The most memory that was used, on the device or by this process, in bytes."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def _rendered(text: Text) -> str:
    """The text with its colors where they can be seen."""
    console = Console(file=sys.stdout, soft_wrap=True)
    with console.capture() as capture:
        console.print(text, end="", highlight=False)
    return capture.get()


class ShowsLines(TrainerCallback):
    """Shows lines. Logs that are not the trainer's stay dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = Lines()

    @abstractmethod
    def write(self, text: str, state: TrainerState) -> None:
        """Show a line, if this process shows anything."""

    @abstractmethod
    def write_dict(self, args: ESConfig, state: TrainerState, control: TrainerControl, logs: dict[str, Any]) -> None:
        """Show all of a log."""

    def on_train_begin(self, args: ESConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.write(_rendered(self.lines.before(args, state)), state)

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
            self.write_dict(args, state, control, logs or {})
        else:
            self.write(_rendered(line), state)


class LineCallback(ShowsLines):
    """Prints lines."""

    def write(self, text: str, state: TrainerState) -> None:
        if state.is_local_process_zero:
            print(text, flush=True)

    def write_dict(self, args: ESConfig, state: TrainerState, control: TrainerControl, logs: dict[str, Any]) -> None:
        self.write(str(logs), state)


class LineProgressCallback(ShowsLines, ProgressCallback):
    """Prints lines above the bar, while there is one."""

    def write(self, text: str, state: TrainerState) -> None:
        if self.training_bar is not None:
            self.training_bar.write(text)

    def write_dict(self, args: ESConfig, state: TrainerState, control: TrainerControl, logs: dict[str, Any]) -> None:
        ProgressCallback.on_log(self, args, state, control, logs=logs)
