from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config import ESConfig


class MemberProgressCallback(TrainerCallback):
    """Shows a bar of the members evaluated inside a step; it is gone when the step ends."""

    def __init__(self):
        self.bar: tqdm | None = None

    def on_step_begin(self, args: ESConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            total = args.population_size_after(state.global_step)
            self.bar = tqdm(total=total, desc="Members", leave=False, position=1, miniters=1, dynamic_ncols=True)

    def on_substep_end(self, args: ESConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_pre_optimizer_step(
        self, args: ESConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
