"""The keyword arguments that TRL's documentation and examples give to a GRPOConfig, given to both configs."""

import argparse
from dataclasses import fields
from enum import Enum

import pytest
from transformers import HfArgumentParser
from trl import GRPOConfig, TrlParser

from es_trainer import ESConfig
from es_trainer.config import GRPO_BATCH


SHAPES = [
    # The trainer's own page: quick start, logging, memory, vLLM, distributed training
    {},
    {"logging_steps": 10},
    {"max_completion_length": 64, "logging_steps": 1},
    {"max_completion_length": 1024, "num_generations": 4, "temperature": 0.7},
    {"log_completions": True, "num_completions_to_print": 2, "log_unique_prompts": True},
    {"log_completions": True, "log_completions_hub_repo": "org/completions"},
    {"reward_weights": [1.0, 0.5]},
    {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 2.0]},
    {"scale_rewards": False},
    {"scale_rewards": "batch"},
    {"mask_truncated_completions": True, "loss_type": "dapo"},
    {"shuffle_dataset": False},
    {"disable_dropout": True},
    {"cast_lm_head_to_fp32": True},
    {"ds3_gather_for_generation": False},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 8},
    {"per_device_train_batch_size": 8, "steps_per_generation": 4, "num_generations": 4},
    {"generation_batch_size": 32, "num_generations": 8},
    {"use_vllm": True},
    {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.25},
    {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://localhost:8000"},
    {"use_vllm": True, "vllm_mode": "server", "vllm_server_host": "10.0.0.2", "vllm_server_port": 9000},
    {"use_vllm": True, "vllm_mode": "server", "vllm_group_port": 51217, "vllm_server_timeout": 300.0},
    {"use_vllm": True, "vllm_model_impl": "transformers", "vllm_max_model_length": 2048},
    {"use_vllm": True, "vllm_structured_outputs_regex": r"<think>.*</think>"},
    {"vllm_importance_sampling_correction": False},
    {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 2.0},
    {"vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_clip_max": 5.0},
    {"use_transformers_continuous_batching": True},
    {"use_transformers_paged": True},
    {"generation_kwargs": {"suppress_tokens": [3]}, "top_p": 0.9, "top_k": 10, "min_p": 0.01},
    {"generation_kwargs": {"do_sample": True}, "temperature": 0.9, "repetition_penalty": 1.1},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"cache_implementation": "static"},
    {"model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"}, "trust_remote_code": True},
    {"max_tool_calling_iterations": 10, "log_multimodal": False},
    {"router_aux_loss_coef": 0.01},
    {"pad_to_multiple_of": 64},
    # Speed and memory
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"gradient_checkpointing": False},
    {"use_liger_kernel": True},
    {"bf16": False, "max_grad_norm": 0.2, "optim": "paged_adamw_8bit"},
    {"torch_compile": True},
    {"torch_empty_cache_steps": 10},
    # The index of papers
    {"loss_type": "grpo", "beta": 0.04, "num_iterations": 1, "epsilon": 0.2},
    {"loss_type": "dr_grpo", "scale_rewards": False, "beta": 0.0},
    {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.0, "mask_truncated_completions": True},
    {"loss_type": "bnpo"},
    {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
    {"loss_type": "sapo", "sapo_temperature_pos": 1.1, "sapo_temperature_neg": 1.2},
    {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.5},
    {
        **{"importance_sampling_level": "sequence", "loss_type": "grpo", "beta": 0.0, "epsilon": 3e-4},
        **{"epsilon_high": 4e-4, "gradient_accumulation_steps": 1, "steps_per_generation": 4},
    },
    {"delta": 4.0, "epsilon": 0.2},
    {"top_entropy_quantile": 0.2},
    {"off_policy_mask_threshold": 0.5, "use_bias_correction_kl": False},
    {"entropy_coef": 0.01, "use_adaptive_entropy": True, "entropy_target": 0.3},
    {"beta": 0.001, "sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 64},
    {"learning_rate": 1e-6, "weight_decay": 0.1, "adam_beta2": 0.99, "warmup_steps": 10},
    {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "max_steps": 100, "num_train_epochs": 1},
    {"learning_rate": 5e-6, "lr_scheduler_type": "constant", "adam_beta1": 0.8, "neftune_noise_alpha": 5.0},
    {"eval_strategy": "steps", "eval_steps": 10, "num_generations_eval": 2, "save_steps": 20},
    {"push_to_hub": True, "hub_model_id": "org/name", "run_name": "grpo", "save_strategy": "no"},
]
SHAPES = [shape for shape in SHAPES if shape.keys() <= {item.name for item in fields(GRPOConfig)}]  # of older versions
BASE = {"output_dir": "grpo", "use_cpu": True}


@pytest.fixture
def warned(caplog):
    """What was said, one warning at most."""

    def get() -> str:
        said = [record.getMessage() for record in caplog.records if record.name == "es_trainer.config"]
        assert len(said) <= 1
        return " ".join(said)

    return get


def written(name: str, value) -> str:
    return f"{name}={(value.value if isinstance(value, Enum) else value)!r}"


def is_carried(config: ESConfig, name: str, value) -> bool:
    if name == "generation_kwargs":  # it agrees with the temperature, by which it is done
        value = {key: v for key, v in value.items() if (key, v) != ("do_sample", True)} or None
    if name == "vllm_server_base_url":
        value = [value]
    return getattr(config, name) == value


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_set_is_carried_or_named_with_both_names_changed(shape, warned):
    mine = ESConfig(**BASE, **shape)
    if {"per_device_train_batch_size", "gradient_accumulation_steps"} & shape.keys():
        of_a_batch, batches = shape.get("per_device_train_batch_size", 8), shape.get("gradient_accumulation_steps", 1)
        assert mine.num_prompts_per_step == of_a_batch * batches
    for name, value in shape.items():
        if name not in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            assert is_carried(mine, name, value) or written(name, value) in warned()
    assert ("learning_rate" in warned()) == (shape.get("learning_rate", 1) < 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_set_is_carried_or_named_with_a_grpo_config(shape, caplog):
    theirs = GRPOConfig(**BASE, **shape)
    defaults = {item.name: item.default for item in fields(GRPOConfig)}
    mine = ESConfig.from_grpo_config(theirs)
    if not GRPO_BATCH & shape.keys():
        assert mine.num_prompts_per_step == 8
    for name in shape.keys() - GRPO_BATCH:
        value = getattr(theirs, name)  # it writes some values in another way
        if value != defaults[name]:  # one that is set to its default cannot be told from one that is not
            assert is_carried(mine, name, value) or written(name, value) in caplog.text, name


@pytest.mark.parametrize("name", ["beta", "sync_ref_model", "ref_model_mixup_alpha"])
def test_a_reference_model_is_the_anchor(name, warned):
    config = ESConfig(**BASE, **{name: 0.25 if name != "sync_ref_model" else True})
    assert "`anchor_decay` pulls towards the initial weights" in warned()
    assert getattr(config, name) == GRPOConfig.__dataclass_fields__[name].default


def test_every_field_is_accepted():
    """Whatever this version of TRL has; with its defaults there is nothing to say."""
    theirs = {item.name for item in fields(GRPOConfig) if item.init}
    assert theirs <= {item.name for item in fields(ESConfig) if item.init}


def test_the_command_line_takes_them_and_help_does_not_list_them(tmp_path):
    for parser in (HfArgumentParser(ESConfig), TrlParser(ESConfig)):
        (config,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "--beta", "0.04"])
        assert isinstance(parser, argparse.ArgumentParser) and "--beta" not in parser.format_help()
        assert config.beta == 0.0
    file = tmp_path / "config.yaml"
    file.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nloss_type: grpo\n")
    (config,) = TrlParser(ESConfig).parse_args_and_config(["--config", str(file)])
    assert config.loss_type == "dapo"


def test_a_batch_size_that_is_left_alone_gives_eight_prompts():
    assert ESConfig.from_grpo_config(GRPOConfig(**BASE)).num_prompts_per_step == 8
    assert ESConfig.from_grpo_config(GRPOConfig(**BASE, num_generations=2)).num_prompts_per_step == 8
    asked = GRPOConfig(**BASE, per_device_train_batch_size=4, num_generations=4)
    assert ESConfig.from_grpo_config(asked).num_prompts_per_step == 1
