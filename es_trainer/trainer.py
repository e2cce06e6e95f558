import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import is_peft_model, set_seed
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput
from transformers.utils import logging
from trl.data_utils import is_conversational

from .callbacks import MemberProgressCallback, print_completions
from .config import ESConfig
from .evolution import EvolutionStrategy, Member, Population
from .evolution.fitness import deviation, mean
from .history import HISTORY_NAME, History, describe, differences, make_optimizer, run_config
from .rewards.scorer import RewardFunc, Scorer, Scores
from .rollout import Completion, PopulationBatch, Rows, TransformersEngine


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


logger = logging.get_logger(__name__)

# Metrics of which a log shows the last value instead of the mean since the last log
LAST_VALUE = ("num_tokens", "distance_from_start")


@dataclass(frozen=True)
class Rollout:
    """What came of one set of weights: completions of a batch of rows, and their scores."""

    rows: list[dict[str, Any]]  # the dataset's row of each completion
    completions: list[Completion]
    messages: list[Any]  # the completions as the reward functions got them
    scores: Scores
    num_tokens: int
    seconds: float  # of the generation


class ESTrainer(Trainer):
    """
    Trainer that fine-tunes all weights of a language model with evolution strategies. The method was proposed in
    [Evolution Strategies at Scale: LLM Fine-Tuning Beyond Reinforcement
    Learning](https://huggingface.co/papers/2509.24372).

    Each step draws a population of perturbations of the weights, lets every perturbed model answer the same prompts,
    and moves the weights along the perturbations, weighted by how well they were rewarded. There are no gradients,
    and nothing is differentiated: rewards may be anything that gives a number.

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
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained. Can be either:

            - A string, being the *model id* of a pretrained model hosted inside a model repo on huggingface.co, or a
              path to a *directory* containing model weights saved using
              [`~transformers.PreTrainedModel.save_pretrained`]. The model is loaded with the keyword arguments in
              `args.model_init_kwargs`, in `float32` unless they have a `dtype`.
            - A [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`] object. Only causal language models are
              supported. Parameters with `requires_grad=False` are left alone. The object is trained in place; its
              parameters become those of the working dtype (`args.bf16`, `args.fp16`), and `save_model` writes them in
              the dtype they had.
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions, whose weighted sum is maximised. A function is called with the keyword arguments
            `prompts`, `completions`, `completion_ids`, every other column of the dataset, `trainer_state`,
            `log_extra(column, values)` and `log_metric(name, value)`; it returns a list with one number for each
            completion, or `None` where it does not apply. It should accept `**kwargs`. Rewards are computed in a
            background thread while the next members generate.
        args ([`ESConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Dataset to use for training. It must include a column `"prompt"` with
            [standard](https://huggingface.co/docs/trl/dataset_formats#standard) (text) or
            [conversational](https://huggingface.co/docs/trl/dataset_formats#conversational) (messages) prompts. Its
            other columns are passed to the reward functions.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Dataset to use for evaluation, like `train_dataset`. It is answered with the unperturbed weights.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, it is loaded from the model's name with
            [`~transformers.AutoTokenizer.from_pretrained`]. If it has no padding token, its end-of-sequence token is
            used.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks to add to the default ones. `on_substep_end` is called for every member that is done.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Must be `(None, None)`: the evolution strategy is the optimizer. Use `args.es_optimizer` for its update
            rule and `args.lr_scheduler_type` for its schedule.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. Then only the adapter is perturbed, updated and saved.

    Raises:
        `ValueError`, `TypeError` or `FileNotFoundError`: If something given cannot work; before the model is loaded
        where that can be told.
    """

    args: ESConfig
    optimizer: EvolutionStrategy

    _tag_names = ["es-trainer", "evolution-strategies"]

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: RewardFunc | list[RewardFunc],
        args: ESConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: "PeftConfig | None" = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = ESConfig(f"{Path(name).name}-ES")
        self.scorer = Scorer(reward_funcs, args.reward_weights)
        _check_arguments(args, model, train_dataset, eval_dataset, optimizers)

        if any(isinstance(dataset, IterableDataset) for dataset in (train_dataset, *_datasets(eval_dataset).values())):
            args.accelerator_config.dispatch_batches = False  # dispatching needs tensors

        # PEFT initializes the adapter randomly
        set_seed(args.seed)
        options = args.model_init_kwargs or {}
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **{"dtype": torch.float32, **options})
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(
                model.config._name_or_path, revision=options.get("revision", "main"), padding_side="left"
            )
        _require_pad_token(processing_class)
        model.config.get_text_config().pad_token_id = processing_class.pad_token_id
        model.generation_config.pad_token_id = processing_class.pad_token_id
        if peft_config is not None:
            model = _with_adapter(model, peft_config)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "All parameters of the model are frozen (requires_grad=False), so there is nothing to train. Set "
                "requires_grad=True on those to train."
            )

        if args.n_gpu > 1:
            args._n_gpu = 1  # one process uses one GPU: torch's DataParallel has no use here
        super().__init__(
            model=model,
            args=args,
            data_collator=_identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.model.add_model_tags(self._tag_names)
        if not args.disable_tqdm:
            self.add_callback(MemberProgressCallback)

        self.engine = TransformersEngine(self.model, processing_class, args)
        for dataset in (train_dataset, *_datasets(eval_dataset).values()):
            self._check_prompts(dataset)
        self.create_optimizer()
        self.population_batch = self._make_population_batch()
        self.history = History(Path(args.output_dir) / HISTORY_NAME)
        self._pending: list[dict[str, Any]] = []  # metrics of the steps since the last log
        self._step_metrics: dict[str, Any] = {}  # of the step under way
        self._best: Rollout | None = None  # of the last step, for the table of completions
        self._warned_of_equal_fitness = False
        self._warned_of_memory = False

    def _check_prompts(self, dataset: Dataset | IterableDataset | None) -> None:
        """Raise now what generation would raise about a prompt."""
        if isinstance(dataset, Dataset):
            for number, batch in enumerate(dataset.select_columns("prompt").iter(1000)):
                self.engine.tokenize(batch["prompt"], first_row=1000 * number)

    # ---- the evolution strategy in the Trainer's loop ----

    def create_optimizer(self, model: nn.Module | None = None) -> EvolutionStrategy:
        """Make the evolution strategy over all parameters with `requires_grad`."""
        if self.optimizer is None:
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            frozen = [p for p in self.model.parameters() if not p.requires_grad]
            self.optimizer = make_optimizer(
                named, set(self.get_decay_parameter_names(self.model)), run_config(self.args), frozen
            )
            self.optimizer.register_step_pre_hook(lambda *_: self._before_update())
            self.optimizer.register_step_post_hook(lambda *_: self._after_update())
        return self.optimizer

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; see [`~transformers.Trainer.train`]. Resuming gives what training without a break would have."""
        if not resume_from_checkpoint and self.optimizer.updates == 0 and self.is_world_process_zero():
            self.history.create(describe(self.optimizer, self.args))
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Evaluate a population on the prompts and tell the optimizer how it did. Returns minus the mean reward."""
        population = self.optimizer.ask()
        rollouts = self._evaluate_population(population, inputs)
        mask = self.args.mask_truncated_completions
        rewards = np.stack([self._prompt_rewards(rollout, mask) for rollout in rollouts])
        utilities = self.optimizer.tell(population, rewards)
        if not utilities.any():
            self._warn_of_equal_fitness()

        fitness = mean(rewards, axis=1)
        self.state.num_input_tokens_seen += sum(rollout.num_tokens for rollout in rollouts)
        self._step_metrics.update(_metrics(rollouts, self.scorer.names))
        self._step_metrics.update(
            {
                "reward": float(mean(fitness)),
                "reward_std": float(deviation(fitness)),
                "reward_max": float(np.nanmax(fitness, initial=-np.inf)),
                "reward_min": float(np.nanmin(fitness, initial=np.inf)),
                "num_tokens": self.state.num_input_tokens_seen,
            }
        )
        self._best = rollouts[int(np.argmax(utilities))]
        return torch.tensor(-self._step_metrics["reward"], device=self.args.device)

    def _evaluate_population(self, population: Population, rows: list[dict[str, Any]]) -> list[Rollout]:
        """Rollouts of all members. The weights are the unperturbed ones afterwards, whatever happens."""
        prompt_ids = self.engine.tokenize([row["prompt"] for row in rows])
        seed = population.members[0].seed
        size, batch_size = self._batch_sizes(prompt_ids)
        rollouts: list[Rollout] = []
        scoring: list[Future[Rollout]] = []
        self._step_metrics["noise_seconds"] = 0.0
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="es_trainer-rewards") as background:
                for start in range(0, len(population), size):
                    with self._installed(population.members[start : start + size]) as group:
                        scores = self._generate(rows, prompt_ids, seed, group, batch_size)
                    # What is scored was generated while the group before it was scored
                    rollouts += [future.result() for future in scoring]
                    scoring = [background.submit(score) for score in scores]
                    for _ in scoring:
                        self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
                rollouts += [future.result() for future in scoring]
        finally:
            with self._timed_noise():
                self.optimizer.restore()
        return rollouts

    @contextlib.contextmanager
    def _installed(self, members: Sequence[Member]) -> Iterator[Rows | None]:
        """Inside, the model evaluates `members`: many in a population batch, or one written into the weights."""
        if self.population_batch is None:
            with self._timed_noise():
                self.optimizer.perturb(*members)
            yield None
            return
        with contextlib.ExitStack() as stack:
            with self._timed_noise():
                group = stack.enter_context(self.population_batch.install(members, self.optimizer.sigma))
            yield group

    @contextlib.contextmanager
    def _timed_noise(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._step_metrics["noise_seconds"] += time.perf_counter() - start

    def _make_population_batch(self) -> PopulationBatch | None:
        """What evaluates many members at once, or `None` if they are evaluated one at a time."""
        if self.args.perturbation == "gaussian":
            on_cpu = self.model.device.type == "cpu"
            if self.args.population_batch_size == 1 or (self.args.population_batch_size is None and on_cpu):
                return None
        batch = PopulationBatch(self.model, self.optimizer.weights)
        problem = batch.check()
        if problem is not None:
            logger.warning(
                f"Members are evaluated one at a time, because this model cannot evaluate several at once: {problem}."
            )
            return None
        self.engine.generation_config.disable_compile = True  # compiled code would not see the members
        return batch

    def _batch_sizes(self, prompt_ids: list[list[int]]) -> tuple[int, int | None]:
        """Members evaluated together, and most sequences generated at once (`None`: all of them)."""
        batch_size = self.args.generation_batch_size
        if self.population_batch is None:
            return 1, batch_size
        if self.args.population_batch_size is not None:
            return self.args.population_batch_size, batch_size
        rows = len(prompt_ids) * self.args.num_generations
        tokens = max(map(len, prompt_ids)) + self.engine.max_new_tokens
        members, fitting = self.population_batch.fitting(rows, tokens, batch_size)
        wanted = min(rows, batch_size or rows)
        if fitting == 0:
            raise ValueError(
                f"There is no memory left to generate {tokens} tokens (the longest prompt and "
                f"`max_completion_length={self.engine.max_new_tokens}`). Lower `max_completion_length`, drop the "
                "longest prompts, or set `population_batch_size` to try nevertheless."
            )
        if fitting < wanted:
            if not self._warned_of_memory:
                logger.warning(
                    f"Memory does not suffice for all sequences of a member at once: they are generated {fitting} at "
                    "a time. Set `generation_batch_size` to choose another number. (Shown once.)"
                )
                self._warned_of_memory = True
            batch_size = fitting
        return members, batch_size

    def _generate(
        self,
        rows: list[dict[str, Any]],
        prompt_ids: list[list[int]],
        seed: int,
        group: Rows | None = None,
        batch_size: int | None = None,
    ) -> list[Callable[[], Rollout]]:
        """Generate with the weights as they are. For each member, what is returned scores its completions."""
        start = time.perf_counter()
        number = self.args.num_generations
        progress = not self.args.disable_tqdm and self.is_world_process_zero()
        completions = self.engine.generate(prompt_ids, seed, number, group, batch_size, progress)
        per_member = len(prompt_ids) * number
        seconds = (time.perf_counter() - start) * per_member / len(completions)
        repeated = [row for row in rows for _ in range(number)]
        prompt_tokens = sum(map(len, prompt_ids)) * number
        conversational = is_conversational({"prompt": rows[0]["prompt"]})

        def score(mine: list[Completion]) -> Rollout:
            messages: list[Any] = [completion.text for completion in mine]
            if conversational:
                messages = [[{"role": "assistant", "content": text}] for text in messages]
            scores = self.scorer(repeated, messages, [completion.ids for completion in mine], self.state)
            num_tokens = prompt_tokens + sum(len(completion.ids) for completion in mine)
            return Rollout(repeated, mine, messages, scores, num_tokens, seconds)

        members = [completions[i : i + per_member] for i in range(0, len(completions), per_member)]
        return [functools.partial(score, mine) for mine in members]

    def _prompt_rewards(self, rollout: Rollout, mask_truncated: bool = False) -> np.ndarray:
        """Mean reward of each prompt, of shape (prompts,); NaN where no completion counts."""
        rewards = rollout.scores.total
        if mask_truncated:
            truncated = np.array([completion.truncated for completion in rollout.completions])
            rewards = np.where(truncated, np.nan, rewards)
        return mean(rewards.reshape(-1, self.args.num_generations), axis=1)

    def _warn_of_equal_fitness(self) -> None:
        if not self._warned_of_equal_fitness:
            logger.warning(
                f"Step {self.state.global_step + 1}: all members have the same fitness, so the weights stay as they "
                "are. If this goes on, use a reward that tells completions apart, more prompts or a larger sigma. "
                "(Shown once.)"
            )
            self._warned_of_equal_fitness = True

    def _before_update(self) -> None:
        self._told = self.optimizer.told
        self._update_start = time.perf_counter()

    def _after_update(self) -> None:
        """Keep the metrics and write the history, now that the update is done."""
        self._step_metrics["update_seconds"] = time.perf_counter() - self._update_start
        self._step_metrics["update_norm"] = self.optimizer.update_norm
        self._step_metrics["distance_from_start"] = self.optimizer.distance_from_start()
        metrics = {key: _json_number(value) for key, value in self._step_metrics.items()}
        self._step_metrics = {}
        self._pending.append(metrics)
        if self.is_world_process_zero():
            self.history.append(
                {
                    "step": self.optimizer.updates,
                    **asdict(self._told),
                    "learning_rate": self.optimizer.param_groups[0]["lr"],
                    "in_place": self.population_batch is None,
                    "metrics": metrics,
                }
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
        rollouts = []
        for step, rows in enumerate(dataloader):
            prompt_ids = self.engine.tokenize([row["prompt"] for row in rows])
            # Other random numbers for every batch, the same ones at every evaluation
            (score,) = self._generate(rows, prompt_ids, seed=step, batch_size=self.args.generation_batch_size)
            rollouts.append(score())
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        rewards = np.concatenate([self._prompt_rewards(rollout) for rollout in rollouts])
        metrics = {
            "loss": -float(mean(rewards)),
            "reward": float(mean(rewards)),
            "reward_std": float(deviation(rewards)),
            **_metrics(rollouts, self.scorer.names),
        }
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{key}": _json_number(value) for key, value in metrics.items()},
            num_samples=len(rewards),
        )

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics of the steps since the last log where `logs` are those of training steps."""
        if "loss" in logs and self._pending:
            logs.pop("grad_norm", None)  # there are no gradients
            logs.update(_average(self._pending))
            logs["loss"] = -logs["reward"] if logs["reward"] is not None else None
            self._pending = []
            if self.args.log_completions and self.is_world_process_zero():
                self._print_best()
        super().log(logs, start_time)

    def _print_best(self) -> None:
        rollout = self._best
        rewards = {name: rollout.scores.by_function[:, i].tolist() for i, name in enumerate(self.scorer.names)}
        print_completions(
            f"Step {self.state.global_step}: completions of the best member",
            [row["prompt"] for row in rollout.rows],
            rollout.messages,
            {**rewards, **rollout.scores.extra},
            self.args.num_completions_to_print,
        )

    # ---- saving and resuming ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained weights in the dtype that the model was given in."""
        with self.optimizer.weights.as_given():
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self.history.copy_to(
                Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._check_resumable(Path(resume_from_checkpoint))
        with self.optimizer.weights.as_given():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self.optimizer.weights.adopt()

    def _check_resumable(self, checkpoint: Path) -> None:
        """
        Raises:
            `ValueError`: If going on from the checkpoint would not be going on with its run.
        """
        for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", HISTORY_NAME):
            if not (checkpoint / name).is_file():
                raise ValueError(
                    f"The checkpoint {checkpoint} has no {name}, so training can't be resumed from it. It was saved "
                    "by another trainer or with save_only_model=True, or saving was interrupted: resume from another."
                )
        header, _ = History(checkpoint / HISTORY_NAME).read()
        found = differences(header, describe(self.optimizer, self.args))
        if found:
            raise ValueError(
                f"The checkpoint {checkpoint} is of another run: {'; '.join(found)}. Resume with the same model and "
                "settings, or start a new run from the checkpoint by giving its path as `model`."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        saved = History(Path(checkpoint) / HISTORY_NAME)
        _, steps = saved.read()
        logged = max((log["step"] for log in self.state.log_history if "loss" in log), default=0)
        self._pending = [line["metrics"] for line in steps if line["step"] > logged]
        if self.is_world_process_zero():
            os.makedirs(self.args.output_dir, exist_ok=True)
            saved.copy_to(self.args.output_dir)

    def _load_best_model(self) -> None:
        with self.optimizer.weights.as_given():
            super()._load_best_model()
            self.optimizer.weights.adopt()

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        # The weights themselves are bf16 or fp16: no autocast, no gradient scaler
        return {**super()._build_accelerator_args(**kwargs), "mixed_precision": "no"}


# ---- checks ----


def _check_arguments(args: ESConfig, model: Any, train_dataset: Any, eval_dataset: Any, optimizers: Any) -> None:
    """What can be told before a model is loaded."""
    if args.world_size > 1:
        raise ValueError(f"ESTrainer runs on one process, but was launched on {args.world_size}.")
    if tuple(optimizers) != (None, None):
        raise ValueError(
            f"`optimizers={optimizers!r}` is not supported: the evolution strategy is the optimizer. Choose its "
            "update rule with `es_optimizer` and its schedule with `lr_scheduler_type` and `lr_scheduler_kwargs`."
        )
    if isinstance(model, str) and (Path(model).expanduser().is_absolute() or model.startswith(".")):
        if not Path(model).expanduser().is_dir():
            raise FileNotFoundError(f"`model={model!r}`: there is no such folder.")
    if not isinstance(model, str) and args.model_init_kwargs is not None:
        raise ValueError(
            f"`model_init_kwargs={args.model_init_kwargs!r}` is for models given as a string, but the model is "
            "already loaded. Remove it, or give the model's name."
        )
    _check_dataset("train_dataset", train_dataset)
    for name, dataset in _datasets(eval_dataset).items():
        _check_dataset(name, dataset)


def _check_dataset(name: str, dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        return
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty: give at least one row.")
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"`{name}` has no column 'prompt'; its columns are {dataset.column_names}. Rename the one with the "
            "prompts: dataset.rename_column(..., 'prompt')."
        )


def _datasets(eval_dataset: Any) -> dict[str, Any]:
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{key!r}]": dataset for key, dataset in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}


def _require_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"`processing_class` must be a tokenizer, but is a {type(tokenizer).__name__}.")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "The tokenizer has neither a padding nor an end-of-sequence token. Set `tokenizer.pad_token` and "
                "`tokenizer.eos_token` to tokens of its vocabulary."
            )
        tokenizer.pad_token = tokenizer.eos_token


def _with_adapter(model: PreTrainedModel, peft_config: "PeftConfig") -> "PeftModel":
    # Imported where it is used: importing peft takes seconds
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"`peft_config` must be a `peft.PeftConfig`, but is a {type(peft_config).__name__}.")
    if is_peft_model(model):
        raise ValueError(
            "You passed a `PeftModel` together with a `peft_config`. Merge and unload the existing adapter first and "
            "pass the base model, or leave `peft_config` out to train the adapter that the model has."
        )
    return get_peft_model(model, peft_config)


# ---- metrics ----


def _metrics(rollouts: list[Rollout], names: list[str]) -> dict[str, float]:
    """Metrics over all completions of the rollouts, with GRPOTrainer's names."""
    rewards = np.concatenate([rollout.scores.by_function for rollout in rollouts])
    completions = [completion for rollout in rollouts for completion in rollout.completions]
    lengths = [len(completion.ids) for completion in completions]
    generation_seconds = sum(rollout.seconds for rollout in rollouts)
    metrics = {}
    for i, name in enumerate(names):
        metrics[f"rewards/{name}/mean"] = float(mean(rewards[:, i]))
        metrics[f"rewards/{name}/std"] = float(deviation(rewards[:, i]))
    own: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, values in rollout.scores.metrics.items():
            own.setdefault(name, []).extend(values)
    metrics.update({name: float(np.mean(values)) for name, values in own.items()})
    return metrics | {
        "completions/mean_length": float(np.mean(lengths)),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": float(np.mean([completion.truncated for completion in completions])),
        "tokens_per_second": sum(lengths) / generation_seconds,
        "generation_seconds": generation_seconds,
        "reward_seconds": sum(rollout.scores.seconds for rollout in rollouts),
    }


def _json_number(value: float) -> float | None:
    """JSON knows no NaN and no infinity."""
    return value if np.isfinite(value) else None


def _average(steps: list[dict[str, Any]]) -> dict[str, float | None]:
    averages: dict[str, float | None] = {}
    for key in dict.fromkeys(key for step in steps for key in step):
        values = [step[key] for step in steps if step.get(key) is not None]
        if key in LAST_VALUE:
            averages[key] = values[-1]
        else:
            averages[key] = float(np.mean(values)) if values else None
    return averages


def _identity(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows
