from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config import ESConfig


class RewardPlotCallback(TrainerCallback):
    """
    Draws the logged rewards when training ends: population mean, range and the evaluation's reward.

    Args:
        path (`str`, *optional*):
            Where to write the picture. `None` writes `reward.png` into the output folder.
    """

    def __init__(self, path: str | None = None):
        self.path = path

    def on_train_end(self, args: ESConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        # Imported where it is used: importing matplotlib takes a second
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        train = [log for log in state.log_history if log.get("reward") is not None]
        evaluations = [log for log in state.log_history if log.get("eval_reward") is not None]
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        steps = [log["step"] for log in train]
        axes.fill_between(
            steps,
            [log["reward_min"] for log in train],
            [log["reward_max"] for log in train],
            alpha=0.2,
            label="members",
        )
        axes.plot(steps, [log["reward"] for log in train], label="mean of the population")
        if evaluations:
            rewards = [log["eval_reward"] for log in evaluations]
            axes.plot([log["step"] for log in evaluations], rewards, marker="o", label="held-out prompts")
        axes.set(xlabel="step", ylabel="reward")
        axes.grid(alpha=0.3)
        axes.legend()
        FigureCanvasAgg(figure).print_png(self.path or Path(args.output_dir) / "reward.png")
