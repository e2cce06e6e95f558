"""Saving a run and resuming it: the model, the state of the evolution strategy, and the history of both."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..backends import Backend
from ..config import ESConfig
from ..evolution import EvolutionStrategy
from ..fields import require
from ..run.auto_step import AutoStep
from ..run.checkpoint import (
    check_complete,
    check_content,
    date_by_steps,
    has_state,
    last_good_checkpoint,
    load_scheduler,
    load_state,
    remove_state,
    save_state,
    write_checksums,
)
from ..run.consistency import check_same_weights
from ..run.folder_lock import alone_in
from ..run.history import describe, differences
from ..run.history_file import HISTORY_NAME, History
from ..run.processes import Processes
from ..run.recorder import Recorder
from ..run.run_history import RunHistory
from ..run.settled_prompts import SettledPrompts


logger = logging.get_logger(__name__)


class CheckpointTrainer(Trainer):
    """[`~transformers.Trainer`] whose checkpoints are those of a run with evolution strategies."""

    args: ESConfig
    backend: Backend
    optimizer: EvolutionStrategy
    processes: Processes
    recorder: Recorder
    history: RunHistory
    auto_step: AutoStep
    settled_prompts: SettledPrompts | None

    _peft_config: dict[str, Any] | None = None  # of an adapter that the trainer made
    _whole: dict[torch.Tensor, torch.Tensor] | None = None  # the weights, while they are saved
    _loading: str | None = None  # folder of the model that is loaded
    _repeat_updates = False  # whether to go on from the last update instead of the last checkpoint

    # ---- saving ----

    @contextlib.contextmanager
    def alone_in_folder(self) -> Iterator[None]:
        """Inside, no other run can train in the output folder."""
        with contextlib.ExitStack() as stack:
            self.processes.on_first(lambda: stack.enter_context(alone_in(Path(self.args.output_dir))) or None)
            yield

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the trained weights in the dtype that the model was given in.

        Raises:
            `FloatingPointError`: If training has diverged, so that there is nothing good to save.
        """
        if self.recorder.diverged is not None:
            raise FloatingPointError(f"The model cannot be saved: {self.recorder.diverged} Training has diverged.")
        self._plot_rewards()
        self.backend.take_member_out()
        with self.optimizer.weights.in_checkpoint_dtype():
            self._whole = self.backend.collect()
            try:
                super().save_model(output_dir, _internal_call)
            finally:
                self._whole = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is None and self._whole is not None:
            tensors = self.model.state_dict(keep_vars=True)
            state_dict = {name: self._whole.get(tensor, tensor) for name, tensor in tensors.items()}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_same_weights(self.processes, self.optimizer, self.backend.parts)
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            self._write_checkpoint(folder, model, trial)
        except Exception as error:
            error.add_note(
                f"The checkpoint {folder} could not be saved. No update is lost: {self.history.path} has them. Put "
                "right what is wrong, and start the run again with `resume_from_checkpoint=True`, which passes over "
                f"what is incomplete. {shutil.disk_usage(self.args.output_dir).free / 2**20:.1f} MiB are free there."
            )
            raise
        self.recorder.last_checkpoint = str(folder)

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            date_by_steps(folder.parent)  # those that the Trainer deletes are the oldest by date
            remove_state(folder)
            os.makedirs(folder, exist_ok=True)
            header, lines = self.history.read()
            History(folder / HISTORY_NAME).write(
                header, lines[: self.optimizer.updates]
            )  # before the checkpoint is pushed to the Hub
        if self.args.push_to_hub:
            self._answers_after = self._answer_samples()
        self.create_model_card((self.args.hub_model_id or self.args.output_dir).rstrip("/").split("/")[-1])
        super()._save_checkpoint(model, trial)
        if not self.args.push_to_hub:
            self._seal(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._seal(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _seal(self, folder: Path) -> None:
        self.processes.barrier()  # until all have written their files
        if self.args.should_save:
            write_checksums(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        together = self.optimizer.weights.partitioned
        self.processes.barrier()  # until the folder is cleared
        os.makedirs(output_dir, exist_ok=True)
        if together or self.args.should_save:
            save_state(Path(output_dir), self.optimizer, together, first=self.args.should_save)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        self.processes.barrier()  # what follows says that the checkpoint is complete

    # ---- resuming ----

    def _new_header(self) -> dict[str, Any]:
        """The first line of the history of a run that starts with the weights as they are."""
        header = describe(self.optimizer, self.args)
        header["start"] = self.backend.start_checksum()
        if self._peft_config is not None:
            header["peft_config"] = self._peft_config
        return json.loads(json.dumps(header))

    def _begin_or_resume(self, checkpoint: str | None) -> None:
        """Let the optimizer, its schedule and the history begin, or go on from a checkpoint or from where they are."""
        self.recorder.begin(self.optimizer.updates)
        if checkpoint is not None:
            self._load_optimizer_and_scheduler(checkpoint)
        elif self.optimizer.updates > 0:
            self.history.go_back(self.optimizer.updates)
        if self.optimizer.updates == 0:
            self.history.begin(self._new_header(), self._repeat_updates)
        check_same_weights(self.processes, self.optimizer, self.backend.parts)

    def _where_to_go_on(self) -> str | bool | None:
        """
        The newest good checkpoint of the run; `None` if it was interrupted before the first one was complete, so that
        its history is all there is of it; and `True` if there is nothing, which the Trainer has an error for.
        """
        folder = Path(self.args.output_dir)
        checkpoint = last_good_checkpoint(folder) if folder.is_dir() else None
        if checkpoint is not None:
            return str(checkpoint)
        return None if self.optimizer.updates == 0 and self.history.is_of_run(self._new_header) else True

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        epoch, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        best = self.state.best_model_checkpoint
        if resume_from_checkpoint is not None and (best is None or not os.path.isdir(best)):
            self._find_best_checkpoint(Path(resume_from_checkpoint))
        if self.state.global_step >= max_steps:  # a finished run that was started again: there is no epoch left
            return num_train_epochs, 0
        if self.state.global_step > 0 and not isinstance(self.train_dataset, Dataset):
            # The epochs of a stream are how often it has begun again; its batches since then count as that share of
            # the steps of the run
            epoch = math.ceil(self.state.epoch) - 1
            batches = 0
            if not self.args.ignore_data_skip:
                batches = round((self.state.epoch - epoch) * self._steps_of_checkpoint)
        return epoch, batches

    def _find_best_checkpoint(self, resumed: Path) -> None:
        """Paths in checkpoints are absolute: in a folder that was moved, the best one is beside the resumed one."""
        best = resumed.absolute().with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if best.is_dir():
            logger.warning(f"The folder was moved: the best checkpoint is {best} now.")
            self.state.best_model_checkpoint = str(best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.processes.exchange(lambda: self._check_resumable(Path(resume_from_checkpoint)))
        state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
        self._steps_of_checkpoint = state.max_steps
        if not self.backend.has_whole_weights:
            return  # the optimizer's state has the weights, or says where in the history they are
        self._loading = resume_from_checkpoint
        with self.optimizer.weights.in_checkpoint_dtype():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self.optimizer.weights.adopt()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if not load_result.unexpected_keys:
            super()._issue_warnings_after_load(load_result)
            return
        # Parameters of some models have other names in files, which the Trainer does not know
        saved = type(self.model).from_pretrained(self._loading, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def _check_resumable(self, checkpoint: Path) -> None:
        """
        Raises:
            `ValueError`: If going on from the checkpoint would not be going on with its run.
        """
        check_complete(checkpoint)
        looked_through = self._repeat_updates and self.processes.rank == 0  # when the newest good one was looked for
        if self.args.local_process_index == 0 and not looked_through:
            check_content(checkpoint)
        header, _ = History(checkpoint / HISTORY_NAME).read()
        found = differences(header, describe(self.optimizer, self.args))
        if found:
            raise ValueError(
                f"The checkpoint {checkpoint} is of another run: {'; '.join(found)}. Resume with the same model and "
                "settings, or start a new run from the checkpoint by giving its path as `model`."
            )
        if self.args.eval_kl_prompts > 0 and self.optimizer.updates == 0:
            require(
                self.args,
                header.get("start") in (None, self.backend.start_checksum()),
                "eval_kl_prompts",
                f"the run of the checkpoint {checkpoint} began with other weights than `model` has, and the drift "
                "from those is logged. Give the model that the run began with, or set it to 0.",
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        header, steps = History(Path(checkpoint) / HISTORY_NAME).read()
        self.backend.resume(steps)
        load_state(Path(checkpoint), self.optimizer)
        self.lr_scheduler.load_state_dict(load_scheduler(Path(checkpoint)))
        # A scheduler that was given goes on from the learning rates of the optimizer that it was made with
        for group, learning_rate in zip(
            self.lr_scheduler.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = learning_rate
        self.recorder.resume(checkpoint, steps, self.optimizer.updates, self.state)
        self.auto_step.repeat(steps)
        if self.settled_prompts is not None:  # of this call of train(): the history counts all updates
            done = steps[len(steps) - self.state.global_step :]
            self.settled_prompts.resume([line["prompts"] for line in done])
        self.history.resume(header, steps, self._repeat_updates)

    def _load_best_model(self) -> None:
        checkpoint = Path(self.state.best_model_checkpoint)
        if has_state(checkpoint):
            # All of its state: a further call of train() goes on from the best update, and the history with it
            load_state(checkpoint, self.optimizer)
            return
        self._loading = str(checkpoint)
        with self.optimizer.weights.in_checkpoint_dtype():
            super()._load_best_model()
            self.optimizer.weights.adopt()
        self.optimizer.begin()  # the model is all that was saved
