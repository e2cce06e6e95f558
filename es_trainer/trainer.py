"""ESTrainer: evolution strategies in the loop of the Transformers Trainer. `training_step` is the method."""

import itertools
import os
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging
from trl import GRPOConfig

from . import adapters
from .agents import AgentFunc, EnvironmentFactory, Environments
from .backends import (
    Drift,
    Prompts,
    RolloutFunc,
    TrainerInputs,
    check_mode,
    evaluate_batches,
    evaluate_population,
    pick,
)
from .checks import check_arguments, check_model, check_settled_prompts
from .config import ESConfig
from .data import by_name, check_datasets
from .engines import Engine
from .evolution import EvolutionStrategy, Population
from .evolution.fitness import deviation, mean
from .loading import load
from .overrides.checkpoints import CheckpointTrainer
from .overrides.gradient_free import GradientFreeTrainer
from .overrides.hub import HubTrainer
from .report.completions import BestCompletions
from .report.console import show_progress
from .rewards.caller import CallSettings
from .rewards.model import RewardModel
from .rewards.scorer import RewardFunc, Scorer
from .rollout import Generations
from .run import fingerprint
from .run.auto_step import AutoStep
from .run.consistency import check_same_weights
from .run.history import tell_again
from .run.history_file import HISTORY_NAME
from .run.metrics import Summary, completion_metrics, json_number
from .run.processes import Processes
from .run.recorder import Recorder
from .run.run_history import RunHistory


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


logger = logging.get_logger(__name__)


class ESTrainer(CheckpointTrainer, HubTrainer, GradientFreeTrainer):
    """
    Trainer that fine-tunes all weights of a language model with evolution strategies. The method was proposed in
    [Evolution Strategies at Scale: LLM Fine-Tuning Beyond Reinforcement
    Learning](https://huggingface.co/papers/2509.24372).

    Each step draws a population of perturbations of the weights, lets every perturbed model answer the same prompts
    (or prompts of its own), and moves the weights along the perturbations, weighted by how well they were rewarded.
    There are no gradients, and nothing is differentiated: rewards may be anything that gives a number.

    Several processes share out the members of a population, each with all of the weights. Nothing but a few numbers
    for each member travels between them, and the result does not depend on how many they are. `args` chooses what
    generates and where the weights are; see [`~backends.pick`].

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
              supported, which may read images, too. Parameters with `requires_grad=False` are left alone, and so are
              those that no completion depends on (the vision tower, if there are no images in the data). The object is
              trained in place. While the trainer trains or evaluates, its parameters are of the working dtype
              (`args.bf16`, `args.fp16`); before and after, they hold the trained weights in the dtype in which they
              were given, and what you change in them is trained from then on. Parameters that were given in neither
              float32 nor the working dtype, and those with `master_weights="host"`, take the memory of a copy then.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            Reward functions, whose weighted sum is maximised. Each can be:

            - A function, which is called with the keyword arguments `prompts`, `completions`, `completion_ids`, every
              other column of the dataset, `trainer_state`, `log_extra(column, values)` and `log_metric(name, value)`.
              It returns a list with one number for each completion, or `None` where it does not apply, and should
              accept `**kwargs`. Functions that are `async` run together. One that is decorated with
              [`~rewards.per_member`] returns one number for all completions of a member.
            - A string, being the name or folder of a reward model: it is loaded with
              [`~transformers.AutoModelForSequenceClassification.from_pretrained`], `num_labels=1` and
              `args.model_init_kwargs`.
            - A [`~transformers.PreTrainedModel`] for sequence classification.

            Functions are called in the thread that trains, after each member has generated, for the unperturbed
            weights (`args.evaluate_center`) and in evaluations. Those that are `async`, like judges that are asked
            over a network, run while the next members generate. `trainer.model` has the member's weights then, or, if
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
            `args.shuffle_dataset=True`. Images may be in a column `"image"` or `"images"`, or in the messages of the
            prompts; see docs/images.md. Video and audio are not supported.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], or a `dict` of them, *optional*):
            Dataset to use for evaluation, like `train_dataset`. It is answered with the unperturbed weights. Metrics
            of several datasets are named after them: `eval_<name>_reward`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer, or processor of a model that reads images. If `None`, it is loaded from the model's name with
            [`~transformers.AutoProcessor.from_pretrained`] if the model has a processor, and
            [`~transformers.AutoTokenizer.from_pretrained`] otherwise. If there is no padding token, the
            end-of-sequence token is used.
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
        tools (`list[Callable]`, *optional*):
            Functions, which may be async, that the model may call while it answers. Their names, type hints and
            docstrings are what it is shown. A call is answered with what the function returns, or with its error if it
            raises, and the model goes on, until it calls none, `args.max_tool_calling_iterations` turns are over, or
            `args.max_completion_length` is reached. Reward functions get the messages of all turns.
        rollout_func (`Callable`, *optional*):
            Function `rollout_func(prompts, trainer)` that generates the completions, with `trainer.model` and
            `trainer.processing_class`, while the model has the weights of one member. It gets the prompts of a step
            once each, and returns a `dict` with `"prompt_ids"` and `"completion_ids"`. Each has
            `trainer.num_generations` lists of tokens for the first prompt, then for the second, and so on. A function
            may also return one list for each prompt that it gets: if `trainer.num_generations` is larger than 1, it
            is called a second time, with each prompt as often as completions of it are missing. Other entries are
            passed to the reward functions, apart from `"logprobs"` and `"logprob_token_ids"`, which have no use here,
            and `"env_mask"`, which tells the model's own tokens (1) from others in `completion_ids`. Not on
            every backend does `trainer.model` have the member's weights; `trainer.generate(prompts)` always does.
        environment_factory (`Callable` or `dict[str, Callable]`, *optional*):
            Makes an environment when it is called. Each rollout has an instance of its own, which begins with
            `reset(**row)`: the text that this returns stands behind the prompt's last message. Its other public
            methods are tools. If it has a method `get_reward()`, which may be async, that is a reward of weight 1
            under the name of its class, and `reward_funcs` may be `None`. Reward functions get the instances as
            `environments`. With a `dict`, each row has the name of its environment in the column `"environment"`.
            Without a `train_dataset`, `args.max_steps` steps are done on what `reset()` returns.
        agent_func (`Callable`, *optional*):
            Function `agent_func(example, endpoint)`, which may be async: a program that asks the model for completions
            by OpenAI's API, and returns the reward of what came of it. It is called once for each member, row of the
            dataset and generation. The rows need no column `"prompt"`, and `reward_funcs` may be `None`.
            `endpoint.base_url`, `endpoint.api_key` and `endpoint.model` are what a client needs; `endpoint.run` runs a
            subprocess with them. It returns a number, `None`, or a dict: its `"reward"` is a number, or a dict of
            numbers by name, which are added; its other entries are logged with the completions. Reward functions also
            get `agent_result` and `agent_calls`; their `completions` are the model's last answers.
        majority_key (`Callable`, *optional*):
            With `args.generation_reward="majority"`: the answer that a completion (text or messages) gives. If `None`,
            it is the text.

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
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: list[Callable] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
        agent_func: AgentFunc | None = None,
        majority_key: Callable[[Any], Hashable] | None = None,
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
        self.tools = list(tools or [])
        environments = None if environment_factory is None else Environments(environment_factory, self.tools)
        inputs = TrainerInputs(
            model, quantization_config, peft_config, rollout_func, self.tools, environments, agent_func
        )
        generations = Generations(args.generation_reward, majority_key)
        self.scorer = Scorer(
            reward_funcs,
            args.reward_weights,
            reward_processing_classes,
            inputs.own_rewards,
            generations,
            CallSettings.of(args),
        )
        check_arguments(args, model, optimizers, quantization_config, peft_config)
        check_settled_prompts(args, self.scorer.of_sets)
        check_mode(args, inputs)
        self._inputs = inputs
        train_dataset, eval_dataset = inputs.train_dataset(args, train_dataset), inputs.with_prompts(eval_dataset)
        check_datasets(args, train_dataset, eval_dataset)
        self.processes = Processes()
        datasets = {"train_dataset": train_dataset, **by_name(eval_dataset)}
        self.processes.agree_if_several(lambda: fingerprint.of_run(args, self.scorer.names, datasets))

        # PEFT initializes the adapter randomly
        set_seed(args.seed)
        self.backend = pick(args, inputs, self.processes, self)
        self.backend.check_data(datasets)
        model, processing_class = load(
            model, processing_class, args, quantization_config, peft_config, self.backend.loads_weights, datasets
        )
        self._peft_config = adapters.to_json(peft_config) if peft_config is not None else None
        self.scorer.load_models(args)
        self.rollout_func = rollout_func
        self.num_generations = args.num_generations
        self.num_generations_eval = args.num_generations_eval or args.num_generations

        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        _, self.lr_scheduler = optimizers
        self.model.add_model_tags(self._tag_names)
        show_progress(self, args)

        self.processes.agree_if_several(lambda: fingerprint.of_model(self.model))
        self.backend.start(self.model, processing_class)
        for name, dataset in datasets.items():
            self.backend.answers.check(self.engine, name, dataset)
        self.create_optimizer()
        self.history = RunHistory(Path(args.output_dir) / HISTORY_NAME, self.processes)
        self.recorder = Recorder(args, self.processes, self.history, self.scorer.names)
        self.auto_step = AutoStep()
        self.drift = Drift(self.backend, args.eval_kl_prompts)
        self.completions = BestCompletions(args, self.processes, self.scorer.names)
        self._reported = 0  # members of the step under way of which callbacks were told
        self.optimizer.weights.to_checkpoint_dtype()

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

    # ---- training ----

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
        self._begin_or_resume(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model, train_dataloader

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Train; see [`~transformers.Trainer.train`]. Resuming gives what training without a break would have.

        With `resume_from_checkpoint=True`, updates after the last checkpoint that are in `history.jsonl` are done
        again from their seeds and utilities: no member is evaluated twice. A checkpoint that is incomplete or damaged
        is passed over, and a run without a good one goes on from its history alone. Give the checkpoint's path to
        evaluate the updates after it anew, for instance with another reward. A history that does not go on is kept
        under another name.

        A further call goes on with the weights and the optimizer's state as they are. After
        `load_best_model_at_end`, those are of the best checkpoint, and the history goes on from its update. With
        `save_only_model`, the best model begins a run of its own.
        """
        self.backend.check(self.model)
        with self.alone_in_folder(), self.backend.in_working_dtype():
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train(
        self, resume_from_checkpoint: str | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        if self.args.push_to_hub and self.optimizer.updates == 0:
            self._answers_before = self._answer_samples()
        self._repeat_updates = resume_from_checkpoint is True
        if self._repeat_updates:
            resume_from_checkpoint = self.processes.on_first(self._where_to_go_on)
        broken = self.optimizer.weights.not_finite()
        if broken is not None and not resume_from_checkpoint:
            raise FloatingPointError(
                f"Weights of `{broken}` are NaN or infinite before training{' in float16' * self.args.fp16}. Give a "
                f"model with finite weights{', or set bf16=True' * self.args.fp16}."
            )
        if self.optimizer.updates == 0:  # and no checkpoint is loaded yet
            self.drift.begin(by_name(self.eval_dataset).values())
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Evaluate a population on the prompts and tell the optimizer how it did. Returns minus the mean reward."""
        self.backend.check(self.model)
        self.recorder.begin_step()
        self.completions.begin_step()
        return torch.tensor(-self._reward_of_step(inputs), dtype=torch.float32, device=self.args.device)

    def _reward_of_step(self, rows: list[dict[str, Any]]) -> float:
        """Tell the optimizer how a population did. Returns the mean reward."""
        self.optimizer.sigma = self.args.sigma_at(self.state.global_step, self.state.max_steps)
        self.optimizer.population_size = self.args.population_size_after(self.state.global_step)
        population = self.optimizer.ask()
        done = self.history.next_repeated(lambda: self._conditions(population), self.optimizer.updates)
        if done is None:
            return self._evaluate_and_tell(population, rows[: self.args.num_rows_after(self.state.global_step)])
        # Before the run was interrupted
        tell_again(self.optimizer, done)
        self.auto_step.repeat([done])
        self.state.num_input_tokens_seen = done["metrics"]["num_tokens"]
        if self.settled_prompts is not None:
            self.settled_prompts.repeat(done["prompts"])
        return self.recorder.repeat(done)

    def _conditions(self, population: Population) -> dict[str, Any]:
        """What makes the update of a step, apart from rewards."""
        return {
            "seeds": [member.seed for member in population],
            "signs": [member.sign for member in population],
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "sigma": self.optimizer.sigma,
            "in_place": self.backend.in_place,
        }

    def _evaluate_and_tell(self, population: Population, rows: list[dict[str, Any]]) -> float:
        """Returns the mean reward."""
        self._reported = 0
        try:
            with self.backend.evaluating_members():
                prompts = self._prompts(rows, self.num_generations, seed=population.seed)
                if not isinstance(self.train_dataset, Dataset):
                    self.processes.agree_if_several(lambda: fingerprint.of_prompts(rows, self.state.global_step + 1))
                evaluation = evaluate_population(
                    self.backend,
                    self.scorer,
                    population,
                    prompts,
                    self.state,
                    report=self._report_members,
                    keep=self.completions.keep,
                )
        except FloatingPointError as error:
            raise self.recorder.divergence(str(error), self.state) from error
        self._report_members(len(population))
        utilities = self.optimizer.tell(population, evaluation.compared, evaluation.members_per_prompt)
        if self.args.auto_step and self.optimizer.updates % self.args.auto_step == 0 and utilities.any():
            self._choose_step_scale()
        self.completions.choose(utilities)
        self.state.num_input_tokens_seen += evaluation.num_tokens
        if self.settled_prompts is not None:
            drawn = self.settled_prompts.tell(evaluation.settled)
            self.recorder.drawn(drawn, self.settled_prompts.share)
        step = self.state.global_step + 1
        return self.recorder.evaluated(evaluation, utilities, self.optimizer.sigma, self.backend.noise_seconds, step)

    def _choose_step_scale(self) -> None:
        names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else [None]
        held_out = itertools.chain.from_iterable(self.get_eval_dataloader(names[0]))
        rows = list(itertools.islice(held_out, self.args.auto_step_prompts))
        try:
            self.recorder.tried(self.auto_step.choose(self.optimizer, lambda: self._evaluate_batches([rows])[0]))
        except FloatingPointError as error:
            raise self.recorder.divergence(str(error), self.state) from error

    def _prompts(self, rows: list[dict[str, Any]], number: int, seed: int) -> Prompts:
        return Prompts(rows, self.backend.answers.tokenize(self.engine, rows), number, seed)

    def _report_members(self, done: int) -> None:
        """Tell callbacks of members that are done, here or elsewhere."""
        done = min(done, self.optimizer.population_size)  # the unperturbed weights are none
        for _ in range(self._reported, done):
            self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        self._reported = done

    def _before_update(self) -> None:
        if self.lr_scheduler.optimizer is not self.optimizer:  # it was given, and made with another optimizer
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr_scheduler.get_last_lr()[0]
            self.lr_scheduler.optimizer.step()  # moves nothing, without gradients, and is what the scheduler waits for
        self.recorder.begin_update(self.optimizer)

    def _after_update(self) -> None:
        self.recorder.updated(self.optimizer, self.state, self.backend.in_place)
        if self.optimizer.updates % self.args.consistency_check_steps == 0:
            check_same_weights(self.processes, self.optimizer, self.backend.parts)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics of the steps since the last log where `logs` are of steps or of all of training."""
        of_steps = self.recorder.complete(logs)
        super().log(logs, start_time)
        if of_steps:
            self.completions.write(self.state.global_step, self.callback_handler.callbacks)

    def generate(self, prompts: list[Any], num_generations: int = 1) -> list[dict[str, Any]]:
        """
        Complete prompts in a `rollout_func`, with the weights of the member that it is called for, wherever they are;
        see [`RolloutFuncAnswers.generate`].
        """
        return self.backend.answers.generate(prompts, num_generations)

    # ---- evaluation ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The prompts of an evaluation; see [`~transformers.Trainer.get_eval_dataloader`]."""
        return super().get_eval_dataloader(self._inputs.with_prompts(eval_dataset))

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Answer the dataloader's prompts with the unperturbed weights and average the rewards."""

        def report() -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        with self.backend.in_working_dtype():
            rewards, summaries = self._evaluate_batches(dataloader, report)
            drift = self.drift.metrics(dataloader.dataset)
        metrics = {
            "loss": -mean(rewards),
            "reward": mean(rewards),
            "reward_std": deviation(rewards),
            **completion_metrics(summaries, self.scorer.names),
            **drift,
            "num_tokens": self.state.num_input_tokens_seen,
        }
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{key}": json_number(value) for key, value in metrics.items()},
            num_samples=len(rewards),
        )

    def _evaluate_batches(
        self, batches: Iterable[list[dict[str, Any]]], report: Callable[[], None] = lambda: None
    ) -> tuple[np.ndarray, list[Summary]]:
        """Rewards of all prompts with the weights as they are, of shape (prompts,), and what to log of them."""

        def prompts(rows: list[dict[str, Any]], number: int) -> Prompts:
            # Other random numbers for every batch, the same ones at every evaluation
            return self._prompts(rows, self.num_generations_eval, seed=number)

        evaluated = evaluate_batches(self.backend, self.scorer, batches, prompts, self.state, report)
        if not evaluated:
            raise ValueError("`eval_dataset` is empty: the stream has no rows to evaluate.")
        rewards = np.concatenate([values for values, _ in evaluated])
        return rewards, [summary for _, parts in evaluated for summary in parts]
