"""
What is known of the fields of `ESConfig`: which have an effect, which values they take, and which of them processes
and resumed runs must share. Fields that the config defines say it themselves, in their metadata; what is said here is
of those that it has from other configs.

Those of `TrainingArguments` are inherited. Those that only `GRPOConfig` has are added with its defaults, so that a
script's keyword arguments can stay as they are. What was set and has no effect is named in one warning.
"""

import argparse
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from enum import Enum
from functools import cache
from typing import Any, Literal, get_type_hints

from transformers import TrainingArguments
from trl import GRPOConfig


# Who has to have the same value: nobody, all processes, or all processes and whoever resumes or replays the run
SameIn = Literal["nobody", "processes", "run"]
# Whether a value is valid, and what it must be
Valid = tuple[Callable[[Any], bool], str]
# Beside which other settings a field has an effect, and how that is written
Needs = tuple[Callable[[Any], bool], str]


@dataclass(frozen=True)
class About:
    """
    What is known of a field.

    Args:
        same_in (`str`, *optional*, defaults to `"nobody"`):
            Who has to have the same value: `"nobody"`, `"processes"` (by other values they would do different things
            at the same time) or `"run"` (other values make other updates, so resumed runs must share it, too).
        valid (`tuple[Callable, str]`, *optional*):
            Whether a value is valid, and what it must be.
        needs (`tuple[Callable, str]`, *optional*):
            Whether it has an effect in a config, and beside which other settings it has.
        not_from_grpo (`str`, *optional*):
            Why the value of a [`~trl.GRPOConfig`] says nothing about evolution strategies.
    """

    same_in: SameIn = "nobody"
    valid: Valid | None = None
    needs: Needs | None = None
    not_from_grpo: str | None = None


class Help(str):
    """The help of a field, which carries what else is known of it: parsers hand all other metadata on to argparse."""

    about: About


def about(help: str, same_in: SameIn, **known: Any) -> dict[str, Help]:
    """
    The metadata of a field that `ESConfig` defines.

    Args:
        help (`str`):
            What `--help` says.
        same_in (`str`):
            See [`About`].
        **known:
            Further fields of [`About`].
    """
    text = Help(help)
    text.about = About(same_in, **known)
    return {"help": text}


def one_of(values: tuple[str, ...]) -> Valid:
    """The field has one of a few values."""
    return (lambda value: value in values), f"choose one of {', '.join(map(repr, values))}."


NOT_NEGATIVE: Valid = (lambda value: value >= 0), "it must not be negative."
AT_LEAST_1: Valid = (lambda value: value is not None and value >= 1), "it must be at least 1."


def at_least_1_or_none(meaning: str) -> Valid:
    """A number, or `None` with a meaning of its own."""
    return (lambda value: value is None or value >= 1), f"it must be at least 1, or None for {meaning}."


def by_steps(what: str, least: int, first: str) -> Valid:
    """Numbers by the steps after which they begin, or `None`; the field `first` has the number of the start."""
    return (
        lambda numbers: numbers is None or min(numbers) >= 1 and min(numbers.values()) >= least,
        f"{what} must be at least {least}, and begin after at least 1 step; `{first}` is the first.",
    )


ADAM: Needs = (lambda c: c.es_optimizer == "adam"), "es_optimizer='adam'"
MOMENTUM: Needs = (lambda c: c.es_optimizer != "sgd"), "es_optimizer='adam' or 'momentum'"
WARMUP: Needs = (
    lambda c: c.lr_scheduler_type != "constant",
    "a schedule that warms up, such as lr_scheduler_type='constant_with_warmup' or 'linear'",
)
EVALUATION_BY_STEPS: Needs = (lambda c: c.eval_strategy == "steps"), "eval_strategy='steps'"
EVALUATION: Needs = (lambda c: c.eval_strategy != "no"), "eval_strategy='steps' or 'epoch'"
SHUFFLING: Needs = (
    lambda c: c.shuffle_dataset or c.train_sampling_strategy == "sequential",
    "shuffle_dataset=True",
)
GROUPING: Needs = (
    lambda c: c.train_sampling_strategy == "group_by_length",
    "train_sampling_strategy='group_by_length'",
)
GRPOS_ADAM = "Adam is `es_optimizer='adam'`"

_GRADIENTS = "there are no gradients"
_ANCHOR = "`anchor_decay` pulls towards the initial weights"
_PASSES = "a step evaluates each member once, on `num_prompts_per_step` prompts"
_EVALUATION = "evaluations are the rewards of completions"
_COMPILE = "nothing is compiled: members are written into the model"
_LIGER = "a module with Liger's kernels would not see the members' noise"
_DTYPE = "evaluations have the dtype of training, `bf16` or `fp16`"
_PAGED = "members that are evaluated together, `population_batch_size`, take its place"

# Fields of TrainingArguments that do what they do in any other Trainer
WITH_EFFECT = {
    "seed": About("run"),
    "data_seed": About("run"),
    "fp16": About("run"),
    "weight_decay": About("run", NOT_NEGATIVE, not_from_grpo="its strength is that of the learning rate"),
    "adam_beta1": About("run", needs=MOMENTUM, not_from_grpo=GRPOS_ADAM),
    "adam_beta2": About("run", needs=ADAM, not_from_grpo=GRPOS_ADAM),
    "adam_epsilon": About("run", needs=ADAM, not_from_grpo=GRPOS_ADAM),
    "warmup_steps": About("processes", needs=WARMUP),
    "eval_steps": About("processes", needs=EVALUATION_BY_STEPS),
    "eval_delay": About(needs=EVALUATION),
    "train_sampling_strategy": About(valid=one_of(("random", "sequential", "group_by_length")), needs=SHUFFLING),
    "length_column_name": About(needs=GROUPING),
    **dict.fromkeys(
        (
            *("max_steps", "num_train_epochs", "dataloader_drop_last", "eval_strategy", "save_strategy"),
            *("lr_scheduler_kwargs",),
        ),
        About("processes"),
    ),
    **dict.fromkeys(
        (
            *("output_dir", "gradient_accumulation_steps", "tf32"),
            *("logging_strategy", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
            *("log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project"),
            *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
            *("eval_on_start", "save_only_model", "save_on_each_node", "save_total_limit"),
            *("enable_jit_checkpoint", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
            *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
            *("hub_revision", "ignore_data_skip", "restore_callback_states_from_checkpoint", "full_determinism"),
            *("use_cpu", "accelerator_config", "deepspeed", "ddp_backend", "ddp_timeout"),
            *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
            *("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_in_order"),
            *("debug", "skip_memory_metrics", "do_train", "do_eval", "do_predict", "resume_from_checkpoint"),
            *("local_rank", "logging_dir", "warmup_ratio"),  # of older versions
        ),
        About(),
    ),
}

# Fields that cannot work, and what to do
REFUSED = {
    "auto_find_batch_size": "it would change the prompts of a step; lower generation_batch_size instead when memory "
    "runs out.",
    "parallelism_config": "weights are partitioned with recipes/accelerate_configs/zero3.yaml, or with "
    "vllm_tensor_parallel_size.",
    "fsdp": "FSDP is not supported. Use recipes/accelerate_configs/zero3.yaml to partition the weights, or "
    "recipes/accelerate_configs/multi_gpu.yaml if they fit into one device.",
}

# Fields that have no effect, and why, or what to use instead
WITHOUT_EFFECT = {
    # of TrainingArguments
    "optim": "`es_optimizer` is the update rule",
    "optim_args": "`es_optimizer` is the update rule",
    "optim_target_modules": "`requires_grad=False` freezes parameters",
    "average_tokens_across_devices": _GRADIENTS,
    "max_grad_norm": _GRADIENTS,
    "activation_checkpointing": _GRADIENTS,
    "activation_checkpointing_kwargs": _GRADIENTS,
    "gradient_checkpointing": _GRADIENTS,
    "gradient_checkpointing_kwargs": _GRADIENTS,
    "ddp_find_unused_parameters": _GRADIENTS,
    "ddp_bucket_cap_mb": _GRADIENTS,
    "ddp_broadcast_buffers": _GRADIENTS,
    "ddp_static_graph": _GRADIENTS,
    "label_smoothing_factor": "there are no labels",
    "label_names": "there are no labels",
    "neftune_noise_alpha": "the members' noise is `sigma`",
    "bf16_full_eval": _DTYPE,
    "fp16_full_eval": _DTYPE,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "torch_empty_cache_steps": "`generation_batch_size` bounds the memory",
    "include_num_input_tokens_seen": "`num_tokens` is logged",
    "prediction_loss_only": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "fsdp_config": "FSDP is not supported",
    # of GRPOConfig; others that only it has are about its loss
    "beta": _ANCHOR,
    "sync_ref_model": _ANCHOR,
    "ref_model_mixup_alpha": _ANCHOR,
    "ref_model_sync_steps": _ANCHOR,
    "num_iterations": _PASSES,
    "steps_per_generation": _PASSES,
    "scale_rewards": "`fitness_shaping` is how rewards are compared",
    "router_aux_loss_coef": _GRADIENTS,
    "disable_dropout": "dropout is off while members are evaluated",
    "cast_lm_head_to_fp32": "`bf16=False` computes in the dtype of the model",
    "use_transformers_continuous_batching": _PAGED,
    "transformers_continuous_batching_config": _PAGED,
    "use_transformers_paged": _PAGED,
    "vllm_group_port": "weights are not sent to servers",
}


def default(item: Field) -> Any:
    """The default value of a field."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def _of_grpo() -> list[tuple[str, Any, Field]]:
    """The fields that GRPOConfig has beside those of TrainingArguments; `--help` does not list them."""
    inherited = {item.name for item in fields(TrainingArguments)}
    types = get_type_hints(GRPOConfig)
    return [
        (item.name, types[item.name], field(default=item.default, metadata={"help": argparse.SUPPRESS}))
        for item in fields(GRPOConfig)
        if item.name not in inherited
    ]


# A base class: what the config defines itself comes first
GRPOFields = make_dataclass("GRPOFields", _of_grpo(), repr=False, eq=False)


def without_effect(own: frozenset[str]) -> dict[str, str]:
    """
    Fields that have no effect, and why or what to use instead, where that can be said.

    Args:
        own (`frozenset[str]`):
            Fields that the config defines itself.
    """
    of_grpo = {item.name: "" for item in fields(GRPOFields) if item.name not in own}
    return of_grpo | WITHOUT_EFFECT


@cache
def known_of(config: type) -> dict[str, About]:
    """
    What is known of each field that has an effect.

    Args:
        config (`type`):
            The config's class.
    """
    texts = {item.name: item.metadata.get("help") for item in fields(config)}
    own = {name: text.about for name, text in texts.items() if isinstance(text, Help)}
    return {name: known for name, known in (WITH_EFFECT | own).items() if name in texts}


def same_in(config: type, who: SameIn) -> list[str]:
    """The fields that have to be the same in all processes, or in all of a run."""
    return [name for name, known in known_of(config).items() if known.same_in == who]


def require(config: Any, condition: bool, name: str, demand: str) -> None:
    """
    Raises:
        `ValueError`: Unless a condition holds; names the field, its value and the way out.
    """
    if not condition:
        raise ValueError(f"`{name}={getattr(config, name)!r}` is not valid: {demand}")


def was_set(value: Any, item: Field) -> bool:
    """Whether a field has another value than its default."""
    return value != default(item)


def asks_for_something(value: Any, item: Field) -> bool:
    """Whether a field without effect was set to what would have one: `None`, `False` and empty lists are all "off"."""
    if item.name == "fsdp_config" and isinstance(value, dict):
        return any(value.values())  # older versions fill it in, with all off
    is_on = bool(default(item)) and default(item) != "no"  # of which parsers make `False`
    return was_set(value, item) and bool(value or is_on)


def listing(settings: dict[str, Any], reasons: dict[str, str]) -> str:
    """Settings as they are written, with what is to be said of them."""
    said = {name: f" ({reasons[name]})" if reasons.get(name) else "" for name in settings}
    shown = {name: value.value if isinstance(value, Enum) else value for name, value in settings.items()}
    return ", ".join(f"{name}={value!r}{said[name]}" for name, value in shown.items())
