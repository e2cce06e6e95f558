"""The table of a run in a notebook."""

from typing import Any

from transformers import TrainerControl, TrainerState
from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

from ..config import ESConfig
from .plots import FIGURES, held_out_labels


class RewardTableCallback(NotebookProgressCallback):
    """Shows the table of Transformers, with rewards in place of losses."""

    def on_train_begin(self, args: ESConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.training_tracker = NotebookTrainingTracker(state.max_steps)

    def on_log(
        self,
        args: ESConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        of_step = {"reward": "reward", **FIGURES, "step_time": "seconds"} if "step_time" in logs else {}
        shown = of_step | held_out_labels(logs)
        values = {name.capitalize(): f"{logs[key]:.4g}" for key, name in shown.items() if logs.get(key) is not None}
        if values and self.training_tracker is not None:
            self.training_tracker.write_line({"Step": state.global_step} | values)

    def on_evaluate(
        self,
        args: ESConfig,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_tracker is None:
            super().on_evaluate(args, state, control, metrics, **kwargs)
            return
        self.training_tracker.remove_child()
        self.prediction_bar = None
        self._force_next_update = True
