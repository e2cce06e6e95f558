"""
Fields that `ESConfig` has from other configs, and which of them have an effect here.

Those of `TrainingArguments` are inherited. Those that only `GRPOConfig` has are added with its defaults, so that a
script's keyword arguments can stay as they are. What was set and has no effect is named in one warning.
"""

import argparse
from dataclasses import MISSING, Field, field, fields, make_dataclass
from enum import Enum
from typing import Any, get_type_hints

from transformers import TrainingArguments
from trl import GRPOConfig


_GRADIENTS = "there are no gradients"
_ANCHOR = "`anchor_decay` pulls towards the initial weights"
_PASSES = "every population is evaluated once, on `num_prompts_per_step` prompts"
_EVALUATION = "evaluations are the rewards of completions"
_COMPILE = "nothing is compiled: members are written into the model"
_LIGER = "a module with Liger's kernels would not see the members' noise"
_DTYPE = "evaluations have the dtype of training, `bf16` or `fp16`"
_PAGED = "members that are evaluated together, `population_batch_size`, take its place"

# Fields of TrainingArguments that do what they do in any other Trainer
WITH_EFFECT = frozenset(
    (
        *("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "tf32", "use_cache"),
        *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
        *("log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_on_start"),
        *("save_strategy", "save_steps", "save_only_model", "save_on_each_node", "save_total_limit"),
        *("enable_jit_checkpoint", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
        *("hub_revision", "ignore_data_skip", "restore_callback_states_from_checkpoint", "full_determinism"),
        *("seed", "data_seed", "use_cpu", "accelerator_config", "deepspeed", "ddp_backend", "ddp_timeout"),
        *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
        *("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_in_order"),
        *("remove_unused_columns", "train_sampling_strategy", "length_column_name", "debug", "skip_memory_metrics"),
        *("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"),
        *("logging_dir", "warmup_ratio"),  # of older versions
    )
)

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
    "multi_objective_aggregation": "rewards are summed with `reward_weights` before members are compared",
    "router_aux_loss_coef": _GRADIENTS,
    "disable_dropout": "dropout is off while members are evaluated",
    "cast_lm_head_to_fp32": "`bf16=False` computes in the dtype of the model",
    "max_tool_calling_iterations": "tools are not supported yet",
    "log_multimodal": "images are not supported yet",
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


def was_set(value: Any, item: Field) -> bool:
    """Whether a field has another value than its default."""
    return value != default(item)


def asks_for_something(value: Any, item: Field) -> bool:
    """Whether a field without effect was set to what would have one: `None`, `False` and empty lists are all "off"."""
    if item.name == "fsdp_config" and isinstance(value, dict):
        return any(value.values())  # older versions fill it in, with all off
    return was_set(value, item) and bool(value or default(item))


def listing(settings: dict[str, Any], reasons: dict[str, str]) -> str:
    """Settings as they are written, with what is to be said of them."""
    said = {name: f" ({reasons[name]})" if reasons.get(name) else "" for name in settings}
    shown = {name: value.value if isinstance(value, Enum) else value for name, value in settings.items()}
    return ", ".join(f"{name}={value!r}{said[name]}" for name, value in shown.items())
