"""The Transformers Trainer's loop without gradients: no wrapped model, and all batches for every process."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import fields
from inspect import signature
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import IterableDataset
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import seed_worker
from transformers.utils import logging

from ..config import ESConfig
from ..data import check_eval_dataset, collate, shuffled
from ..images import IMAGE_COLUMNS
from ..run.settled_prompts import SettledPrompts
from ..values import InSigmas


logger = logging.get_logger(__name__)


class GradientFreeTrainer(Trainer):
    """
    [`~transformers.Trainer`] for an optimizer that evaluates a model instead of differentiating it.

    A step takes as many rows as the config says, however many processes there are. There is no autocast, no gradient
    scaler, no `DataParallel` and no engine of DeepSpeed's around the model.
    """

    args: ESConfig

    settled_prompts: SettledPrompts | None = None  # with `skip_settled_prompts`

    def __init__(self, args: ESConfig, **kwargs: Any):
        if args.n_gpu > 1:
            logger.warning(
                f"This process uses one of {args.n_gpu} GPUs. To use all, start the script with `accelerate "
                "launch` and recipes/accelerate_configs/multi_gpu.yaml: the members of a population are shared out."
            )
            args._n_gpu = 1  # torch's DataParallel has no use here
        super().__init__(args=args, data_collator=functools.partial(collate, name="train_dataset"), **kwargs)
        self.is_deepspeed_enabled = False  # the Trainer's own code for it is about optimizers and gradients
        self.model.eval()  # nothing is done with dropout here

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        # The weights themselves are bf16 or fp16: no autocast, no gradient scaler
        return {**super()._build_accelerator_args(**kwargs), "mixed_precision": "no"}

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """The schedule of the learning rate, which follows sigma's if it was given in units of sigma."""
        made_here = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        args = self.args
        if made_here and isinstance(args.learning_rate, InSigmas) and args.sigma_schedule != "constant":
            if not isinstance(scheduler, LambdaLR):
                raise ValueError(
                    f"`lr_scheduler_type={args.lr_scheduler_type!r}` is not valid: with learning_rate in units of "
                    "sigma and a sigma_schedule, give one that follows from the step, such as 'constant' or 'linear'."
                )
            scheduler.lr_lambdas = [
                lambda step, factor=factor: factor(step) * args.sigma_at(step, num_training_steps) / args.sigma
                for factor in scheduler.lr_lambdas
            ]
        return scheduler

    def get_total_train_batch_size(self, args: ESConfig) -> int:
        """Rows of a step, however many processes there are."""
        return args.largest_num_rows

    def floating_point_ops(self, inputs: list[dict[str, Any]]) -> int:
        """Not estimated: the Trainer's formula is for a training step with a backward pass."""
        return 0

    def _set_signature_columns_if_needed(self) -> None:
        # What the trainer reads of a row; the Trainer would keep what the model's `forward` takes
        self._signature_columns = ["prompt", *IMAGE_COLUMNS]

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], torch.utils.data.Sampler] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        # Every process gets all batches: members are shared out, or whole batches of an evaluation
        collator = self.data_collator
        if not is_training:
            check_eval_dataset("eval_dataset", dataset, self.args)
            collator = functools.partial(collate, name="eval_dataset")
        elif isinstance(dataset, IterableDataset) and self.args.shuffle_dataset:
            dataset = shuffled(dataset, self.args)
        # Not from the dataset: a transform may need them
        collator = self._get_collator_with_removed_columns(collator, description=description)
        # All of the Trainer's options for it, of which older versions have fewer
        options = {
            field.name.removeprefix("dataloader_"): getattr(self.args, field.name)
            for field in fields(self.args)
            if field.name.removeprefix("dataloader_") in signature(DataLoader).parameters
        }
        if isinstance(dataset, torch.utils.data.IterableDataset):
            del options["drop_last"]
        elif is_training and self.args.skip_settled_prompts > 0:
            options["sampler"] = self.settled_prompts = SettledPrompts(
                len(dataset),
                batch_size,
                self.args.skip_settled_prompts,
                self.args.data_seed,
                self.args.shuffle_dataset,
                self.args.dataloader_drop_last,
            )
        elif is_training and not self.args.shuffle_dataset:
            options["sampler"] = SequentialSampler(dataset)
        else:
            options["sampler"] = sampler_fn(dataset)
        if is_training:
            workers = self.args.dataloader_num_workers
            options["worker_init_fn"] = functools.partial(seed_worker, num_workers=workers, rank=0)
        dataloader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator, **options)
        return prepare_data_loader(
            dataloader,
            num_processes=1,
            process_index=0,
            use_seedable_sampler=self.accelerator.use_seedable_sampler,
            data_seed=self.args.data_seed,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[dict[str, Any]]], num_batches: int, device: torch.device
    ) -> tuple[list[list[dict[str, Any]]], torch.Tensor | int | None]:
        """The prompts of a step; see [`~transformers.Trainer.get_batch_samples`]."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches and self.state.global_step == 0:
            raise ValueError("`train_dataset` is empty: the stream has no rows.")
        return batches, count
