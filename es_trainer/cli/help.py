"""
What `es-trainer train --help` prints: the options that a run is usually made of, in groups.

Making a parser takes seconds, as it imports torch. So the text lies in `train_help.txt`, which
`python -m es_trainer.cli.help` writes anew; a test compares it with the parser's options.
"""

from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path


TRAIN_HELP = Path(__file__).with_name("train_help.txt")

GROUPS = {
    "model": (
        *("model_name_or_path", "model_revision", "dtype", "attn_implementation", "trust_remote_code"),
        *("model_init_kwargs", "load_in_4bit", "load_in_8bit", "use_peft", "lora_r", "lora_alpha"),
        *("lora_target_modules", "bf16", "fp16", "use_cpu", "master_weights", "weight_quantization"),
    ),
    "evolution": (
        *("population_size", "population_size_schedule", "sigma", "sigma_schedule", "sigma_min_ratio"),
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "antithetic", "num_steps_per_population"),
        *("anchor_penalty", "anchor_weights", "evaluate_center", "auto_step", "auto_step_prompts"),
        *("perturbation", "perturbation_rank", "population_batch_size", "fitness_shaping", "es_optimizer"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "anchor_decay", "num_prompts_per_step"),
        *("num_prompts_per_step_schedule", "unique_prompts"),
        *("max_steps", "num_train_epochs", "seed", "consistency_check_steps", "ds3_gather_for_generation"),
    ),
    "generation": (
        *("max_completion_length", "num_generations", "num_generations_eval", "generation_batch_size", "temperature"),
        *("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "chat_template_kwargs"),
        *("max_tool_calling_iterations", "cache_implementation", "agent_concurrency", "agent_timeout"),
        *("agent_errors", "agent_port"),
    ),
    "rewards and data": (
        *("task", "agent", "reward_funcs", "reward_model_name_or_path", "reward_weights"),
        *("multi_objective_aggregation", "generation_reward", "mask_truncated_completions", "reward_workers"),
        *("reward_timeout", "reward_retry_on", "reward_retries"),
        *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming"),
        *("datasets", "system_prompt", "shuffle_dataset", "skip_settled_prompts", "remove_unused_columns"),
    ),
    "vLLM": (
        *("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_structured_outputs_regex", "vllm_lora"),
        *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"),
        *("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"),
        "vllm_enable_sleep_mode",
    ),
    "output": (
        *("output_dir", "logging_steps", "report_to", "log_format", "log_completions", "log_multimodal"),
        *("num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo", "eval_strategy", "eval_steps"),
        *("per_device_eval_batch_size", "eval_kl_prompts", "save_strategy", "save_steps", "save_total_limit"),
        *("load_best_model_at_end", "metric_for_best_model", "resume_from_checkpoint", "push_to_hub", "hub_model_id"),
    ),
}

INTRODUCTION = """\
usage: es-trainer train [--config FILE] [--OPTION VALUE ...]

Train a language model with evolution strategies. Options can also stand in a YAML file, given by --config FILE; the
command line overrides it. --recipe NAME takes a file that comes with this package: `es-trainer recipes` lists them.
Options of `accelerate launch` are passed on to it, such as --num_processes, and --accelerate_config gives it a file or
the name of one that comes with this package (multi_gpu, zero3, ...).

--help-all lists every option, those of transformers.TrainingArguments included; --debug shows the traceback of errors.
"""


class OneName(ArgumentDefaultsHelpFormatter):
    """Shows an option by its first name only."""

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {values}"


def train_help(parser: ArgumentParser) -> str:
    """
    Args:
        parser (`ArgumentParser`):
            That of `es-trainer train`.
    """
    actions: dict[str, Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # the first of an option and its `--no_` complement
    formatter = OneName(prog="es-trainer train", width=119, max_help_position=40)
    for title, names in GROUPS.items():
        formatter.start_section(title)
        formatter.add_arguments([actions[name] for name in names])
        formatter.end_section()
    return f"{INTRODUCTION}\n{formatter.format_help()}"


if __name__ == "__main__":
    from ..scripts.es import make_parser

    TRAIN_HELP.write_text(train_help(make_parser()))
