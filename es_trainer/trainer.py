import contextlib
import functools
import itertools
import json
import math
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    TrainOutput,
    get_last_checkpoint,
    seed_worker,
)
from transformers.utils import logging
from trl import GRPOConfig

from . import adapters
from .backends import Prompts, RolloutFunc, evaluate_batches, evaluate_population, pick
from .checks import check_arguments, check_model, refuse_unsupported
from .config import ESConfig
from .data import by_name, check_datasets, check_eval_dataset, collate, shuffled
from .engines import Engine
from .engines.vocabulary import check_special_tokens, require_pad_token
from .evolution import EvolutionStrategy, Population
from .evolution.fitness import deviation, fitness, mean
from .loading import load_model, load_tokenizer, with_adapter
from .report.completions import CompletionsLog, plain
from .report.model_card import REWARD_PLOT, model_card
from .report.plots import plot_rewards
from .report.progress import MemberProgressCallback
from .rewards.model import RewardModel
from .rewards.scorer import RewardFunc, Scorer
from .rollout import Rollout
from .run import fingerprint
from .run.checkpoint import check_complete, load_parts, optimizer_files, save_part
from .run.history import (
    agree,
    describe,
    differences,
    tell_again,
)
from .run.history_file import HISTORY_NAME, History
from .run.metrics import Summary, average, completion_metrics, json_number
from .run.processes import ProcessError, Processes
from .saving import make_savable
from .text_only import freeze_other_modalities


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


logger = logging.get_logger(__name__)

SAMPLES = 3  # of the model card

# Waits for the scores of completions that are being scored
Scoring = Callable[[], Rollout]


class ESTrainer(Trainer):
    """
    Trainer that fine-tunes all weights of a language model with evolution strategies. The method was proposed in
    [Evolution Strategies at Scale: LLM Fine-Tuning Beyond Reinforcement
    Learning](https://huggingface.co/papers/2509.24372).

    Each step draws a population of perturbations of the weights, lets every perturbed model answer the same prompts,
    and moves the weights along the perturbations, weighted by how well they were rewarded. There are no gradients,
    and nothing is differentiated: rewards may be anything that gives a number.

    Several processes share out the members of a population, each with all of the weights. Nothing but a few numbers
    for each member travels between them, and the result does not depend on how many they are. With DeepSpeed ZeRO-3,
    each process keeps a part of the weights; see `args.ds3_gather_for_generation`.

    With `args.use_vllm`, vLLM generates: in these processes with its own weights, of which the model's parameters
    become views, or on servers, and then the model here has no weights.

    Example:

    ```python
    >>> from es_trainer import ESTrainer
    >>> from es_trainer.tasks import conciseness

    >>> task = conciseness()
    >>> trainer = ESTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     reward_funcs=task.reward_funcs,
    ...     train_dataset=task.train_dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or `Path` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained. Can be either:

            - A string, being the *model id* of a pretrained model hosted inside a model repo on huggingface.co, or a
              path to a *directory* containing model weights saved using
              [`~transformers.PreTrainedModel.save_pretrained`]. The model is loaded with the keyword arguments in
              `args.model_init_kwargs`, in `float32` unless they have a `dtype`.
            - A [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`] object. Only causal language models are
              supported. Parameters with `requires_grad=False` are left alone, and so are those that no completion of a
              text depends on (the vision tower of a multimodal model). The object is trained in place. While the
              trainer trains or evaluates, its parameters are of the working dtype (`args.bf16`, `args.fp16`);
              before and after, they hold the trained weights in the dtype in which they were given, and what you
              change in them is trained from then on. Parameters that were given in neither float32 nor the working
              dtype, and those with `master_weights="host"`, take the memory of a copy then.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            Reward functions, whose weighted sum is maximised. Each can be:

            - A function, which is called with the keyword arguments `prompts`, `completions`, `completion_ids`, every
              other column of the dataset, `trainer_state`, `log_extra(column, values)` and `log_metric(name, value)`.
              It returns a list with one number for each completion, or `None` where it does not apply, and should
              accept `**kwargs`. Functions that are `async` run together.
            - A string, being the name or folder of a reward model: it is loaded with
              [`~transformers.AutoModelForSequenceClassification.from_pretrained`], `num_labels=1` and
              `args.model_init_kwargs`.
            - A [`~transformers.PreTrainedModel`] for sequence classification.

            Functions are called in the thread that trains, after each member has generated, and in evaluations too.
            Those that are `async`, like judges that are asked over a network, run while the next members generate;
            make one `async` if it spends its time waiting. `trainer.model` has the member's weights then, or, if
            members are evaluated several at a time (`args.population_batch_size`), the unperturbed ones. Functions
            that are `async` must not use it. What functions get is their own: they may change the lists and dicts.
        args ([`ESConfig`] or [`~trl.GRPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used. A [`~trl.GRPOConfig`] goes
            through [`ESConfig.from_grpo_config`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Dataset to use for training. It must include a column `"prompt"` with
            [standard](https://huggingface.co/docs/trl/dataset_formats#standard) (text) or
            [conversational](https://huggingface.co/docs/trl/dataset_formats#conversational) (messages) prompts. Its
            other columns are passed to the reward functions. An iterable dataset is shuffled in a buffer if
            `args.shuffle_dataset=True`. Images, video and audio are not supported.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], or a `dict` of them, *optional*):
            Dataset to use for evaluation, like `train_dataset`. It is answered with the unperturbed weights. Metrics
            of several datasets are named after them: `eval_<name>_reward`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, it is loaded from the model's name with
            [`~transformers.AutoTokenizer.from_pretrained`]. If it has no padding token, its end-of-sequence token is
            used.
        reward_processing_classes ([`~transformers.PreTrainedTokenizerBase`] or a `list` of them, *optional*):
            Tokenizers of the reward functions that are models: one if there is one reward function, or a list as long
            as `reward_funcs`, of which the entries of other functions are ignored. Where it is `None`, the tokenizer
            is loaded by the model's name.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks to add to the default ones. `on_substep_end` is called for every member that is done.
        optimizers (`tuple[None, LRScheduler | None]`, *optional*, defaults to `(None, None)`):
            `None`, because the evolution strategy is the optimizer (`args.es_optimizer` is its update rule), and the
            scheduler to use instead of that of `args.lr_scheduler_type`. The learning rate that it gives to the first
            parameter group of the optimizer that it was made with is the evolution strategy's.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization used when the model is loaded by its name. Quantized weights cannot be perturbed: give a
            `peft_config`, too, to train an adapter (QLoRA).
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. Then only the adapter is perturbed, updated and saved.
        tools (`None`, *optional*):
            Not supported. It is here for the sake of [`~trl.GRPOTrainer`]'s signature.
        rollout_func (`Callable`, *optional*):
            Function `rollout_func(prompts, trainer)` that generates the completions, with `trainer.model` and
            `trainer.processing_class`, while the model has the weights of one member. It gets the prompts of a step
            once each, and returns a `dict` with `"prompt_ids"` and `"completion_ids"`. Each has
            `trainer.num_generations` lists of tokens for the first prompt, then for the second, and so on. A function
            may also return one list for each prompt that it gets: if `trainer.num_generations` is larger than 1, it
            is called a second time, with each prompt as often as completions of it are missing. Other entries are
            passed to the reward functions, apart from `"logprobs"` and `"logprob_token_ids"`, which have no use here,
            and `"env_mask"`, which tells the model's own tokens (1) from others in `completion_ids`.
        environment_factory (`None`, *optional*):
            Not supported. It is here for the sake of [`~trl.GRPOTrainer`]'s signature.

    Raises:
        `ValueError`, `TypeError` or `FileNotFoundError`: If something given cannot work; before the model is loaded
            where that can be told.
        [`~processes.ProcessError`]: If the processes were started with different settings, data, packages or models.
    """

    args: ESConfig
    optimizer: EvolutionStrategy

    _tag_names = ["es-trainer", "evolution-strategies"]

    def __init__(
        self,
        model: "str | os.PathLike | PreTrainedModel | PeftModel",
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: ESConfig | GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: None = None,
    ):
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        if not isinstance(model, str):
            check_model(model, processing_class)
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or type(model).__name__
            args = ESConfig(f"{Path(name).name}-ES")
        elif isinstance(args, GRPOConfig):
            args = ESConfig.from_grpo_config(args)
        else:
            args.check()
        refuse_unsupported(tools=tools, environment_factory=environment_factory)
        self.scorer = Scorer(reward_funcs, args.reward_weights, reward_processing_classes)
        check_arguments(args, model, optimizers, quantization_config, peft_config, rollout_func)
        check_datasets(args, train_dataset, eval_dataset)
        self.processes = Processes()
        datasets = {"train_dataset": train_dataset, **by_name(eval_dataset)}
        if self.processes.count > 1:
            self.processes.agree(fingerprint.of_run(args, self.scorer.names, datasets))

        # PEFT initializes the adapter randomly
        set_seed(args.seed)
        options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        source = model if isinstance(model, str) else None
        self.backend = pick(args, self.processes, source, rollout_func, self)
        if isinstance(model, str):
            model = load_model(model, options, quantization_config, self.backend.loads_weights)
            check_model(model, processing_class)
        if processing_class is None:
            processing_class = load_tokenizer(model, options)
        require_pad_token(processing_class)
        check_special_tokens(model, processing_class)
        model.config.get_text_config().pad_token_id = processing_class.pad_token_id
        model.generation_config.pad_token_id = processing_class.pad_token_id
        self._peft_config: dict[str, Any] | None = None  # of an adapter that is made here
        if peft_config is not None:
            model = with_adapter(model, peft_config, args.seed)
            self._peft_config = adapters.to_json(peft_config)
        make_savable(model)
        freeze_other_modalities(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "All parameters of the model are frozen (requires_grad=False), so there is nothing to train. Set "
                "requires_grad=True on those to train."
            )
        self.scorer.load_models(args)
        self.rollout_func = rollout_func
        self.num_generations = args.num_generations
        self.num_generations_eval = args.num_generations_eval or args.num_generations

        if args.n_gpu > 1:
            logger.warning(
                f"This process uses one of {args.n_gpu} GPUs. To use all, start the script with `accelerate "
                "launch` and recipes/accelerate_configs/multi_gpu.yaml: the members of a population are shared out."
            )
            args._n_gpu = 1  # torch's DataParallel has no use here
        super().__init__(
            model=model,
            args=args,
            data_collator=functools.partial(collate, name="train_dataset"),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        _, self.lr_scheduler = optimizers
        self.model.add_model_tags(self._tag_names)
        self.model.eval()  # nothing is done with dropout here
        if not args.disable_tqdm:
            self.add_callback(MemberProgressCallback)

        self.is_deepspeed_enabled = False  # the Trainer's own code for it is about optimizers and gradients
        if self.processes.count > 1:
            self.processes.agree(fingerprint.of_model(self.model))
        self.backend.start(self.model, processing_class)
        for name, dataset in datasets.items():
            self.backend.answers.check(self.engine, name, dataset)
        self.create_optimizer()
        self.history = History(Path(args.output_dir) / HISTORY_NAME)
        self.completions_log = CompletionsLog(args) if args.log_completions and args.process_index == 0 else None
        self._before: list[str] = []  # what the model answered to the prompts of its card before training
        self._after: list[str] = []
        self._header: dict[str, Any] = {}  # of the history
        self._done_before: list[dict[str, Any]] = []  # lines of updates after the checkpoint, to be done again
        self._line: dict[str, Any] | None = None  # the one that is done again
        self._member_rewards: list[float | None] = []  # of the step under way
        self._last_checkpoint: str | None = None  # of this run
        self._spoiled: str | None = None  # what is wrong with the weights, if training has diverged
        self._go_on = False  # whether to go on from the last update instead of the last checkpoint
        self._pending: list[dict[str, Any]] = []  # metrics of the steps since the last log
        self._step_metrics: dict[str, Any] = {}  # of the step under way
        self._reported = 0  # members of the step under way of which callbacks were told
        self._rollouts: dict[int, Rollout] = {}  # of the members that this process evaluated in the last step
        self._whole: dict[torch.Tensor, torch.Tensor] | None = None  # the weights, while they are saved
        self._best = 0  # the best of all members in the last step
        self._best_utility = 0.0
        self._warned_of_equal_fitness = False
        self._evaluating_members = False
        self.optimizer.weights.hand_out()

    @property
    def engine(self) -> Engine:
        """What generates."""
        return self.backend.engine

    @property
    def population_batch(self) -> Any:
        """What evaluates many members at once, or `None` if they are evaluated one at a time."""
        return self.backend.population_batch

    @property
    def reward_funcs(self) -> list[Callable | PreTrainedModel]:
        """The reward functions and models."""
        functions = self.scorer.functions
        return [function.model if isinstance(function, RewardModel) else function for function in functions]

    @property
    def reward_func_names(self) -> list[str]:
        """Under which names rewards are logged."""
        return self.scorer.names

    @property
    def reward_processing_classes(self) -> list[PreTrainedTokenizerBase | None]:
        """The tokenizer of each reward model."""
        return self.scorer.processing_classes

    @property
    def reward_weights(self) -> torch.Tensor:
        """The weight of each reward function. Values written into it count from the next rewards on."""
        return self.scorer.weights

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.backend.moves_model:
            super()._move_model_to_device(model, device)

    # ---- the evolution strategy in the Trainer's loop ----

    def create_optimizer(self, model: nn.Module | None = None) -> EvolutionStrategy:
        """Make the evolution strategy over all parameters with `requires_grad`."""
        if self.optimizer is None:
            self.optimizer = self.backend.begin(set(self.get_decay_parameter_names(self.model)))
            self.optimizer.register_step_pre_hook(lambda *_: self._before_update())
            self.optimizer.register_step_post_hook(lambda *_: self._after_update())
        return self.optimizer

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        # No wrapper takes care of the model: there are no gradients to reduce
        self.create_optimizer()
        if self._created_lr_scheduler:
            self.lr_scheduler = None
            self._created_lr_scheduler = False
        self.create_scheduler(num_training_steps=max_steps)
        self._pending = []
        self._done_before = []
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        if resume_from_checkpoint is None and self.optimizer.updates > 0:
            self._go_back_in_history()
        if self.optimizer.updates == 0:
            self._header = self._new_header()
            if self._go_on:  # from a history without a checkpoint
                (self._done_before, *_) = self.processes.exchange(lambda: self._resume_history(self._header, []))
        self._check_consistency()
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model, train_dataloader

    def _new_header(self) -> dict[str, Any]:
        """The first line of the history of a run that starts with the weights as they are."""
        header = describe(self.optimizer, self.args)
        header["start"] = self.backend.start_checksum()
        if self._peft_config is not None:
            header["peft_config"] = self._peft_config
        return json.loads(json.dumps(header))

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

    def _set_signature_columns_if_needed(self) -> None:
        # What the trainer reads of a row; the Trainer would keep what the model's `forward` takes
        self._signature_columns = ["prompt"]

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[dict[str, Any]]], num_batches: int, device: torch.device
    ) -> tuple[list[list[dict[str, Any]]], torch.Tensor | int | None]:
        """The prompts of a step; see [`~transformers.Trainer.get_batch_samples`]."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches and self.state.global_step == 0:
            raise ValueError("`train_dataset` is empty: the stream has no rows.")
        return batches, count

    def get_total_train_batch_size(self, args: ESConfig) -> int:
        """Prompts of a step, however many processes there are."""
        return args.num_prompts_per_step

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Train; see [`~transformers.Trainer.train`]. Resuming gives what training without a break would have.

        With `resume_from_checkpoint=True`, updates after the last checkpoint that are in `history.jsonl` are done
        again from their seeds and utilities: no member is evaluated twice. A run without a checkpoint goes on from its
        history alone. Give the checkpoint's path to evaluate them
        anew, for instance with another reward. A history that does not go on is kept under another name.

        A further call goes on with the weights and the optimizer's state as they are. After
        `load_best_model_at_end`, those are of the best checkpoint, and the history goes on from its update. With
        `save_only_model`, the best model begins a run of its own.
        """
        self.backend.check(self.model)
        with self._at_work():
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train(
        self, resume_from_checkpoint: str | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        if self.args.push_to_hub and self.optimizer.updates == 0:
            self._before = self._answer_samples()
        self._go_on = resume_from_checkpoint is True
        if self._go_on and self.processes.exchange(self._has_history_alone)[0]:
            resume_from_checkpoint = None
        broken = self.optimizer.weights.not_finite()
        if broken is not None and not resume_from_checkpoint:
            raise FloatingPointError(
                f"Weights of `{broken}` are NaN or infinite before training{' in float16' * self.args.fp16}. Give a "
                f"model with finite weights{', or set bf16=True' * self.args.fp16}."
            )
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _has_history_alone(self) -> bool:
        """
        Whether the run was interrupted before its first checkpoint, so that the history is all there is of it.

        Raises:
            `ValueError`: If it is the history of another run.
        """
        if self.optimizer.updates > 0 or not self.history.path.is_file():
            return False
        if get_last_checkpoint(self.args.output_dir) is not None:
            return False
        header, _ = self.history.read()
        mine = self._new_header()
        if header != mine:
            found = differences(header, mine) or ["it started with other weights"]
            raise ValueError(
                f"`resume_from_checkpoint=True`: No valid checkpoint found in {self.args.output_dir}, and "
                f"{self.history.path.name} there is of another run: {'; '.join(found)}. Train with the same model and "
                "settings to go on with it, or without `resume_from_checkpoint` to start a new run."
            )
        return True

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Inside, the model computes with the unperturbed weights in the working dtype."""
        if self._evaluating_members:
            if self.processes.count > 1 or self.backend.partitioned:
                raise RuntimeError(
                    "The model cannot be evaluated or saved while several processes evaluate the members of a "
                    "population, each at its own pace. Do it in `on_step_end` instead of `on_substep_end`."
                )
            self.optimizer.restore()
        with self.optimizer.weights.at_work() as changed:
            if changed:
                logger.warning(
                    f"{len(changed)} parameters ({', '.join(changed[:3])}{', ...' * (len(changed) > 3)}) were changed "
                    "outside of training, and their new values are trained from now on. `replay` needs the model as "
                    "it is now."
                )
            yield

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Evaluate a population on the prompts and tell the optimizer how it did. Returns minus the mean reward."""
        self.backend.check(self.model)
        self._step_start = time.perf_counter()
        population = self.optimizer.ask()
        self._line = self._next_line(population)
        if self._line is not None:
            return self._step_again(self._line)
        self.backend.noise_seconds = self._step_metrics["noise_seconds"] = 0.0
        self._reported = 0
        self._rollouts = {}
        self._evaluating_members = True
        try:
            rewards, summaries = self._evaluate_population(population, inputs)
        except FloatingPointError as error:
            raise self._diverged(str(error)) from error
        finally:
            self._evaluating_members = False
            self.backend.restore()
            self._step_metrics["noise_seconds"] = self.backend.noise_seconds
        self._report_members(len(population))
        utilities = self.optimizer.tell(population, rewards)
        if not utilities.any():
            self._warn_of_equal_fitness()

        by_member = fitness(rewards)
        self._member_rewards = [json_number(value) for value in by_member.tolist()]
        self.state.num_input_tokens_seen += sum(summary.num_tokens for summary in summaries)
        self._step_metrics.update(completion_metrics(summaries, self.scorer.names))
        self._step_metrics.update(
            {
                "reward": mean(by_member),
                "reward_std": deviation(by_member),
                "reward_max": float(np.nanmax(by_member, initial=-np.inf)),
                "reward_min": float(np.nanmin(by_member, initial=np.inf)),
                "num_tokens": self.state.num_input_tokens_seen,
            }
        )
        self._best = int(np.argmax(utilities))
        self._best_utility = float(utilities[self._best])
        return torch.tensor(-self._step_metrics["reward"], dtype=torch.float32, device=self.args.device)

    def _next_line(self, population: Population) -> dict[str, Any] | None:
        """The line of this step if its update was done before the run was interrupted."""
        if not self._done_before:
            return None
        line = self._done_before.pop(0)
        expected = {
            "seeds": [member.seed for member in population],
            "signs": [member.sign for member in population],
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "in_place": self.backend.in_place,
        }
        if {key: line[key] for key in expected} == expected:
            return line
        logger.warning(
            f"The updates from {line['step']} on in {self.history.path} are of other settings than those given now: "
            "their members are evaluated anew."
        )
        self._done_before = []
        self._go_back_in_history()
        return None

    def _step_again(self, line: dict[str, Any]) -> torch.Tensor:
        """Tell the optimizer what came of the step before the run was interrupted."""
        tell_again(self.optimizer, line)
        self._rollouts = {}
        self.state.num_input_tokens_seen = line["metrics"]["num_tokens"]
        reward = line["metrics"]["reward"]
        return torch.tensor(math.nan if reward is None else -reward, device=self.args.device)

    def _keep_history(self) -> None:
        """Give the history another name, so that what follows does not replace it."""
        kept = self.history.set_aside()
        if kept is not None:
            logger.warning(f"{self.history.path} was of an earlier run, or went on in another way: it is {kept} now.")

    def _evaluate_population(
        self, population: Population, rows: list[dict[str, Any]]
    ) -> tuple[np.ndarray, list[Summary]]:
        """Rewards of all members, of shape (members, prompts), and what to log."""
        prompts = self._prompts(rows, self.num_generations, seed=population.members[0].seed)
        self._check_same_prompts(rows)

        def keep(member: int, rollout: Rollout) -> None:
            if self.args.log_completions:
                self._rollouts[member] = rollout

        mask = self.args.mask_truncated_completions
        return evaluate_population(
            self.backend, self.scorer, population, prompts, self.state, mask, self._report_members, keep
        )

    def _prompts(self, rows: list[dict[str, Any]], number: int, seed: int) -> Prompts:
        return Prompts(rows, self.backend.answers.tokenize(self.engine, rows), number, seed)

    def _report_members(self, done: int) -> None:
        """Tell callbacks of members that are done, here or elsewhere."""
        for _ in range(self._reported, done):
            self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        self._reported = done

    def _check_same_prompts(self, rows: list[dict[str, Any]]) -> None:
        # Streams cannot be compared at the start
        if self.processes.count > 1 and not isinstance(self.train_dataset, Dataset):
            checksum = zlib.crc32(repr([row["prompt"] for row in rows]).encode())
            self.processes.agree({f"the checksum of the prompts of step {self.state.global_step + 1}": checksum})

    def _warn_of_equal_fitness(self) -> None:
        if not self._warned_of_equal_fitness:
            logger.warning(
                f"Step {self.state.global_step + 1}: all members have the same fitness (or rewards for less than half "
                "of the prompts), so the weights stay as they are. If this goes on, use a reward that applies to all "
                "completions and tells them apart, more prompts or a larger sigma. (Shown once.)"
            )
            self._warned_of_equal_fitness = True

    def _before_update(self) -> None:
        if self.lr_scheduler.optimizer is not self.optimizer:  # it was given, and made with another optimizer
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr_scheduler.get_last_lr()[0]
            self.lr_scheduler.optimizer.step()  # moves nothing, without gradients, and is what the scheduler waits for
        self._update_record = self.optimizer.update_record
        self._update_start = time.perf_counter()

    def _after_update(self) -> None:
        """Keep the metrics and write the history, now that the update is done."""
        self._step_metrics["update_seconds"] = time.perf_counter() - self._update_start
        broken = self.optimizer.weights.not_finite()
        parts = [(self.optimizer.update_norm, self.optimizer.distance_from_start(), broken)]
        if self.optimizer.weights.partitioned:
            parts = self.processes.exchange(lambda: parts[0])
        norms, distances, broken_parts = zip(*parts, strict=True)
        self._step_metrics["update_norm"] = math.hypot(*norms)
        self._step_metrics["distance_from_start"] = math.hypot(*distances)
        if any(broken_parts):
            broken = next(filter(None, broken_parts))
            self._spoiled = f"The update made weights of `{broken}` NaN or infinite."
        elif not math.isfinite(self._step_metrics["update_norm"] + self._step_metrics["distance_from_start"]):
            self._spoiled = "The update is not finite."
        if self._spoiled is not None:
            raise self._diverged(self._spoiled)
        self._step_metrics["step_time"] = time.perf_counter() - self._step_start
        metrics = {key: json_number(value) for key, value in self._step_metrics.items()}
        self._step_metrics = {}
        if self._line is not None:  # which is in the history already
            metrics = self._line["metrics"]
        elif self.is_world_process_zero():
            if self.optimizer.updates == 1:
                self._keep_history()
                self.history.write(self._header, [])
            self.history.append(
                {
                    "step": self.optimizer.updates,
                    "global_step": self.state.global_step + 1,
                    **asdict(self._update_record),
                    "learning_rate": self.optimizer.param_groups[0]["lr"],
                    "in_place": self.backend.in_place,
                    "rewards": self._member_rewards,
                    "metrics": metrics,
                }
            )
        self._pending.append(metrics)
        if self.optimizer.updates % self.args.consistency_check_steps == 0:
            self._check_consistency()

    def _diverged(self, problem: str) -> FloatingPointError:
        """What to raise where weights or what is computed with them are not numbers any more."""
        way_out = "There is no checkpoint of this run from before."
        if self._last_checkpoint is not None:
            way_out = f"The last good checkpoint is {self._last_checkpoint}."
        return FloatingPointError(
            f"Step {self.state.global_step + 1}: {problem} Training has diverged. Lower `learning_rate` "
            f"({self.args.learning_rate}) or `sigma` ({self.args.sigma}){', or set bf16=True' * self.args.fp16}. "
            f"Nothing of this step was saved. {way_out}"
        )

    def _check_consistency(self) -> None:
        """
        Raises:
            [`~processes.ProcessError`]: If processes that should have the same weights do not.
        """
        parts = self.backend.parts
        if self.processes.count == parts:
            return
        checksums = self.processes.exchange(self.optimizer.weights.checksums)
        found = []
        for first in range(parts):  # processes that have the same part of the weights
            most_have, _ = Counter(map(tuple, checksums[first::parts])).most_common(1)[0]
            found += [
                f"`{shard.name}` on process {rank}"
                for rank in range(first, len(checksums), parts)
                for shard, number, usual in zip(self.optimizer.weights.shards, checksums[rank], most_have, strict=True)
                if number != usual
            ]
        if found:
            raise ProcessError(
                f"After update {self.optimizer.updates}, processes have different weights: {', '.join(found[:4])}"
                f"{f' and {len(found) - 4} more' if len(found) > 4 else ''}. Something changed them there and not on "
                "the others: a callback or reward function, or faulty memory. Nothing was saved; resume from the last "
                "checkpoint."
            )

    def floating_point_ops(self, inputs: list[dict[str, Any]]) -> int:
        """Not estimated: the Trainer's formula is for a training step with a backward pass."""
        return 0

    # ---- evaluation ----

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Answer the dataloader's prompts with the unperturbed weights and average the rewards."""
        with self._at_work():
            return self._evaluate_dataloader(dataloader, metric_key_prefix)

    def _evaluate_dataloader(self, dataloader: DataLoader, metric_key_prefix: str) -> EvalLoopOutput:
        def report() -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        def prompts(rows: list[dict[str, Any]], number: int) -> Prompts:
            # Other random numbers for every batch, the same ones at every evaluation
            return self._prompts(rows, self.num_generations_eval, seed=number)

        batches = evaluate_batches(self.backend, self.scorer, dataloader, prompts, self.state, report)
        if not batches:
            raise ValueError("`eval_dataset` is empty: the stream has no rows to evaluate.")
        rewards = np.concatenate([values for values, _ in batches])
        summaries = [summary for _, parts in batches for summary in parts]
        metrics = {
            "loss": -mean(rewards),
            "reward": mean(rewards),
            "reward_std": deviation(rewards),
            **completion_metrics(summaries, self.scorer.names),
            "num_tokens": self.state.num_input_tokens_seen,
        }
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{key}": json_number(value) for key, value in metrics.items()},
            num_samples=len(rewards),
        )

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics of the steps since the last log where `logs` are of steps or of all of training."""
        of_steps = bool(self._pending) and ("loss" in logs or "train_runtime" in logs)
        if of_steps:
            logs.pop("grad_norm", None)  # there are no gradients
            logs.update(average(self._pending))
            logs["loss"] = -logs["reward"] if logs["reward"] is not None else None
            self._pending = []
        super().log(logs, start_time)
        if of_steps and self.args.log_completions:
            self._log_completions()

    def _log_completions(self) -> None:
        """Log those of the best member of the last step."""

        def best() -> Rollout | None:
            """No more than is logged, and nothing that can't be sent."""
            rollout = self._rollouts.get(self._best)
            if rollout is None:
                return None
            extra = {name: plain(values) for name, values in rollout.scores.extra.items()}
            prompts = [{"prompt": row["prompt"]} for row in rollout.rows]
            return replace(rollout, rows=prompts, scores=replace(rollout.scores, extra=extra))

        replies = self.processes.exchange(best)
        if not self.is_world_process_zero():
            return
        rollouts = [rollout for rollout in replies if rollout is not None]
        if not rollouts:  # the step was done again without its members
            return
        # With ZeRO-3 in lockstep, functions of different processes may have logged different columns
        extra = dict.fromkeys(name for rollout in rollouts for name in rollout.scores.extra)
        for name in extra:
            extra[name] = [
                value for rollout in rollouts for value in rollout.scores.extra.get(name, [None] * len(rollout.rows))
            ]
        rewards = np.concatenate([rollout.scores.by_function for rollout in rollouts])
        self.completions_log.write(
            self.state.global_step,
            [row["prompt"] for rollout in rollouts for row in rollout.rows],
            [message for rollout in rollouts for message in rollout.messages],
            [*zip(self.scorer.names, rewards.T.tolist(), strict=True), *extra.items()],
            self._best_utility,
            self.callback_handler.callbacks,
        )

    # ---- saving and resuming ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the trained weights in the dtype that the model was given in.

        Raises:
            `FloatingPointError`: If training has diverged, so that there is nothing good to save.
        """
        if self._spoiled is not None:
            raise FloatingPointError(f"The model cannot be saved: {self._spoiled} Training has diverged.")
        self._plot_rewards()
        if self._evaluating_members:
            with self._at_work():  # refuses it, or takes the member out
                pass
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
        self._check_consistency()
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            for file in folder.glob("optimizer*.pt"):  # of an earlier run on another number of processes
                file.unlink()
            os.makedirs(folder, exist_ok=True)
            header, lines = self.history.read()
            History(folder / HISTORY_NAME).write(
                header, lines[: self.optimizer.updates]
            )  # before the checkpoint is pushed to the Hub
        if self.args.push_to_hub:
            self._after = self._answer_samples()
        self.create_model_card((self.args.hub_model_id or self.args.output_dir).rstrip("/").split("/")[-1])
        super()._save_checkpoint(model, trial)
        self._last_checkpoint = str(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.optimizer.weights.partitioned:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.processes.barrier()  # until the folder is cleared
        os.makedirs(output_dir, exist_ok=True)
        parts = self.backend.parts
        if self.processes.rank < parts:
            save_part(Path(output_dir), self.optimizer.state_dict(), self.processes.rank, parts)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        self.processes.barrier()  # what follows says that the checkpoint is complete

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.processes.exchange(lambda: self._check_resumable(Path(resume_from_checkpoint)))
        state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
        self._steps_of_checkpoint = state.max_steps
        if not self.backend.has_whole_weights:
            return  # the optimizer's state has the weights, or says where in the history they are
        with self.optimizer.weights.in_checkpoint_dtype():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self.optimizer.weights.adopt()

    def _check_resumable(self, checkpoint: Path) -> None:
        """
        Raises:
            `ValueError`: If going on from the checkpoint would not be going on with its run.
        """
        check_complete(checkpoint)
        header, _ = History(checkpoint / HISTORY_NAME).read()
        found = differences(header, describe(self.optimizer, self.args))
        if found:
            raise ValueError(
                f"The checkpoint {checkpoint} is of another run: {'; '.join(found)}. Resume with the same model and "
                "settings, or start a new run from the checkpoint by giving its path as `model`."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        header, steps = History(Path(checkpoint) / HISTORY_NAME).read()
        self.backend.resume(steps)
        self.optimizer.load_parts(load_parts(Path(checkpoint), self.processes.rank, self.backend.group_size))
        self._last_checkpoint, self._spoiled = checkpoint, None
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        # A scheduler that was given goes on from the learning rates of the optimizer that it was made with
        for group, learning_rate in zip(
            self.lr_scheduler.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = learning_rate
        logged = max((log["step"] for log in self.state.log_history if "loss" in log), default=0)
        # The history counts all updates, and the logs the steps of this call of train()
        logged += self.optimizer.updates - self.state.global_step
        self._pending = [line["metrics"] for line in steps if line["step"] > logged]
        (self._done_before, *_) = self.processes.exchange(lambda: self._resume_history(header, steps))

    def _resume_history(self, header: dict[str, Any], steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Let the history go on from the checkpoint's. Returns the lines of updates that are to be done again."""
        if not self.is_world_process_zero():
            return []
        later: list[dict[str, Any]] = []
        if self.history.path.is_file():
            try:
                there, lines = self.history.read()
            except ValueError as error:
                logger.warning(str(error))
                there, lines = {}, []
            if there == header and agree(steps, lines):
                later = lines[len(steps) :]
            if later and self._go_on:
                self.history.write(header, lines)  # without a torn last line
                logger.warning(
                    f"Going on after update {lines[-1]['step']} of {self.history.path}: the updates that are in no "
                    f"checkpoint, from {later[0]['step']} on, are done again from their seeds and utilities."
                )
                return later
            if later or there != header or not agree(steps, lines):
                self._keep_history()
        self.history.write(header, steps)
        return []

    def _go_back_in_history(self) -> None:
        """Let the history end where the weights are, from which on training went further before."""
        if self.is_world_process_zero():
            header, lines = self.history.read()
            if len(lines) > self.optimizer.updates:
                self._keep_history()
                self.history.write(header, lines[: self.optimizer.updates])

    def _load_best_model(self) -> None:
        checkpoint = Path(self.state.best_model_checkpoint)
        if optimizer_files(checkpoint):
            # All of its state: a further call of train() goes on from the best update, and the history with it
            self.optimizer.load_parts(load_parts(checkpoint, self.processes.rank, self.backend.group_size))
            return
        with self.optimizer.weights.in_checkpoint_dtype():
            super()._load_best_model()
            self.optimizer.weights.adopt()
        self.optimizer.begin()  # the model is all that was saved

    # ---- the Hub ----

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
        with self._at_work():
            return self.backend.texts(self.backend.answers.tokenize(self.engine, rows))

    def _sample_rows(self) -> list[dict[str, Any]]:
        dataset = next(iter(by_name(self.eval_dataset).values()), self.train_dataset)
        if dataset is None or not self.backend.answers.by_engine:
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
        prompts = [row["prompt"] for row in self._sample_rows()] if self._before else []
        card = model_card(
            self.args,
            self.model,
            self.optimizer.weights.dtype
            or self.optimizer.weights.shards[0].checkpoint_dtype,  # to ask the model would gather weights, here alone
            self.state.log_history,
            name=model_name,
            repository=self.hub_model_id,
            dataset=dataset_name,
            tags=list(dict.fromkeys([*tags, *self._tag_names])),
            reward_names=self.scorer.names,
            samples=list(zip(prompts, self._before, self._after, strict=False)),
        )
        os.makedirs(self.args.output_dir, exist_ok=True)
        card.save(Path(self.args.output_dir) / "README.md")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> "CommitInfo":
        """Upload the model, its card and the history; see [`~transformers.Trainer.push_to_hub`]."""
        self._finish_current_push()  # before the files that it uploads are written anew
        if self._before:
            self._after = self._answer_samples()
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

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        # The weights themselves are bf16 or fp16: no autocast, no gradient scaler
        return {**super()._build_accelerator_args(**kwargs), "mixed_precision": "no"}
