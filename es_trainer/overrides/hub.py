"""What a run shows on the Hub: its model card, its picture of rewards, and pushes that failed."""

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.utils import logging

from ..backends import Backend
from ..config import ESConfig
from ..data import by_name, collate
from ..evolution import EvolutionStrategy
from ..report.model_card import REWARD_PLOT, model_card
from ..report.plots import plot_rewards
from ..rewards.scorer import Scorer


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


logger = logging.get_logger(__name__)

SAMPLES = 3  # prompts whose answers the model card shows


class HubTrainer(Trainer):
    """[`~transformers.Trainer`] whose model card and pushes are those of a run with evolution strategies."""

    args: ESConfig
    backend: Backend
    optimizer: EvolutionStrategy
    scorer: Scorer

    _answers_before: list[str] = []  # to the model card's prompts, before training
    _answers_after: list[str] = []

    def _plot_rewards(self) -> None:
        pushing = self.hub_model_id is not None and self.push_in_progress is not None
        if pushing and not self.push_in_progress.is_done():
            return  # a file that changes while it is uploaded spoils the push
        if self.is_world_process_zero() and any("reward" in log for log in self.state.log_history):
            plot_rewards({"run": self.state.log_history}, Path(self.args.output_dir) / REWARD_PLOT)

    def _answer_samples(self) -> list[str]:
        """What the model answers to the prompts of its card."""
        rows = self._sample_rows()
        if not rows:
            return []
        with self.backend.in_working_dtype():
            return self.backend.texts(self.backend.answers.tokenize(self.backend.engine, rows))

    def _sample_rows(self) -> list[dict[str, Any]]:
        dataset = next(iter(by_name(self.eval_dataset).values()), self.train_dataset)
        if dataset is None or not self.backend.answers.has_prompts:
            return []
        return collate(list(itertools.islice(dataset, SAMPLES)), name="dataset")

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Write the model card, `README.md` in the output folder.

        Args:
            model_name (`str`, *optional*):
                Name of the model.
            dataset_name (`str`, *optional*):
                Name of the dataset that it was trained on.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        if not self.is_world_process_zero():
            return
        tags = [tags] if isinstance(tags, str) else tags or []
        prompts = [row["prompt"] for row in self._sample_rows()] if self._answers_before else []
        card = model_card(
            self.args,
            self.model,
            self.processing_class,
            self.optimizer.weights.dtype
            or self.optimizer.weights.shards[0].checkpoint_dtype,  # to ask the model would gather weights, here alone
            self.state.log_history,
            name=model_name,
            repository=self.hub_model_id,
            dataset=dataset_name,
            tags=list(dict.fromkeys([*tags, *self._tag_names])),
            reward_names=self.scorer.names,
            samples=list(zip(prompts, self._answers_before, self._answers_after, strict=False)),
        )
        os.makedirs(self.args.output_dir, exist_ok=True)
        card.save(Path(self.args.output_dir) / "README.md")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> "CommitInfo":
        """Upload the model, its card and the history; see [`~transformers.Trainer.push_to_hub`]."""
        self._finish_current_push()  # before the files that it uploads are written anew
        if self._answers_before:
            self._answers_after = self._answer_samples()
        return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._warn_of_failed_pushes()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        # The Trainer leaves the errors of its background pushes in their futures
        if self.hub_model_id is None or self.push_in_progress is None:
            return
        for job in [job for job in self.push_in_progress.jobs if job.done()]:
            self.push_in_progress.jobs.remove(job)
            if job.exception() is not None:
                logger.warning(
                    f"A push to the Hub failed: {' '.join(str(job.exception()).split())}. Everything is in "
                    f"{self.args.output_dir}, and the next push, or `push_to_hub()`, brings it to the Hub."
                )
