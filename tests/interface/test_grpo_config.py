"""`args` may be a GRPOConfig."""

import pytest
from conftest import assert_same, letters, make_tokenizer, weights
from trl import GRPOConfig

from es_trainer import ESConfig, ESTrainer


@pytest.fixture
def grpo_config(tmp_path):
    def make(**options) -> GRPOConfig:
        options = {name: value for name, value in options.items() if name in GRPOConfig.__dataclass_fields__}
        return GRPOConfig(str(tmp_path / "grpo"), **{"use_cpu": True, "report_to": "none", **options})

    return make


def test_what_both_know_is_carried_over(grpo_config):
    theirs = grpo_config(
        max_completion_length=64,
        temperature=0.7,
        top_p=0.9,
        reward_weights=[1.0, 2.0],
        chat_template_kwargs={"enable_thinking": False},
        generation_kwargs={"min_new_tokens": 3},
        model_init_kwargs={"dtype": "bfloat16"},
        mask_truncated_completions=True,
        log_completions=True,
        max_steps=7,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_steps=5,
        save_steps=0.5,
        bf16=False,
        seed=3,
        push_to_hub=True,
        hub_model_id="org/name",
        trust_remote_code=True,
        ds3_gather_for_generation=False,
    )
    mine = ESConfig.from_grpo_config(theirs)
    for name in (
        *["max_completion_length", "temperature", "top_p", "reward_weights", "chat_template_kwargs", "max_steps"],
        *["generation_kwargs", "model_init_kwargs", "mask_truncated_completions", "log_completions", "output_dir"],
        *["lr_scheduler_type", "eval_strategy", "eval_steps", "save_steps", "bf16", "seed", "push_to_hub", "use_cpu"],
        *["hub_model_id", "trust_remote_code", "ds3_gather_for_generation", "report_to"],
    ):
        if name in GRPOConfig.__dataclass_fields__:  # older versions of TRL have no `trust_remote_code`
            assert getattr(mine, name) == getattr(theirs, name), name


def test_what_was_not_changed_is_es_own(grpo_config):
    mine = ESConfig.from_grpo_config(grpo_config())
    default = ESConfig(mine.output_dir, use_cpu=True, report_to="none")
    assert mine.to_dict() == default.to_dict()
    assert (mine.population_size, mine.sigma, mine.learning_rate, mine.temperature) == (30, 1e-3, 5e-4, 0.0)


@pytest.mark.parametrize(
    ("options", "prompts"),
    [
        ({"per_device_train_batch_size": 30, "num_generations": 30, "gradient_accumulation_steps": 8}, 8),
        ({"per_device_train_batch_size": 8, "num_generations": 4, "steps_per_generation": 6}, 12),
        ({"generation_batch_size": 32, "num_generations": 8}, 4),
    ],
)
def test_a_step_takes_as_many_prompts(grpo_config, options, prompts):
    mine = ESConfig.from_grpo_config(grpo_config(**options))
    assert mine.num_prompts_per_step == prompts
    assert (mine.num_generations, mine.generation_batch_size) == (1, None)


def test_overrides_come_last(grpo_config):
    theirs = grpo_config(max_completion_length=64, learning_rate=1e-5)
    mine = ESConfig.from_grpo_config(theirs, population_size=6, learning_rate=0.1, max_completion_length=9)
    assert (mine.population_size, mine.learning_rate, mine.max_completion_length) == (6, 0.1, 9)
    mine = ESConfig.from_grpo_config(theirs, per_device_train_batch_size=3)
    assert mine.num_prompts_per_step == 3
    with pytest.raises(TypeError, match="populaton"):
        ESConfig.from_grpo_config(theirs, populaton=3)


def test_one_warning_lists_what_has_no_meaning(grpo_config, caplog):
    options = {
        "beta": 0.04,
        "epsilon": 0.1,
        "loss_type": "grpo",
        "num_iterations": 2,
        "learning_rate": 1e-5,
        "weight_decay": 0.1,
        "num_generations": 4,
        "scale_rewards": "batch",
        "max_grad_norm": 0.2,
        "gradient_checkpointing": False,
        "vllm_group_port": 9000,
    }
    with caplog.at_level("WARNING"):
        ESConfig.from_grpo_config(grpo_config(**options, max_completion_length=12))
    (warning,) = [record.getMessage() for record in caplog.records if "GRPOConfig" in record.getMessage()]
    for name, value in options.items():
        assert f"{name}={value!r}" in warning
    assert "max_completion_length" not in warning and "per_device" not in warning and "padding" not in warning


def test_overrides_are_warned_of_once(grpo_config, caplog):
    theirs = grpo_config(beta=0.04, epsilon=0.1, learning_rate=1e-5, num_generations=4)
    with caplog.at_level("WARNING"):
        ESConfig.from_grpo_config(theirs, beta=0.05, learning_rate=0.1, num_generations=3)
    assert "epsilon=0.1" in caplog.text and "beta=0.05" in caplog.text and "num_generations=3" in caplog.text
    assert "beta=0.04" not in caplog.text and "learning_rate=1e-05" not in caplog.text
    assert "num_generations=4" not in caplog.text


def test_settings_of_vllm_are_carried_over(grpo_config, caplog):
    options = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": "http://a:1",
        "vllm_server_timeout": 9.0,
        "vllm_structured_outputs_regex": "a+",
        "vllm_max_model_length": 100,
        "vllm_gpu_memory_utilization": 0.5,
        "vllm_model_impl": "transformers",
    }
    with caplog.at_level("WARNING"):
        args = ESConfig.from_grpo_config(grpo_config(**options))
    assert "GRPOConfig" not in caplog.text
    assert {name: getattr(args, name) for name in options} == {**options, "vllm_server_base_url": ["http://a:1"]}


def test_nothing_to_warn_of(grpo_config, caplog):
    with caplog.at_level("WARNING"):
        ESConfig.from_grpo_config(grpo_config(max_steps=2, per_device_train_batch_size=16))
    assert "GRPOConfig" not in caplog.text


def test_a_trainer_takes_a_grpo_config(grpo_config, config, model_folder, dataset, caplog):
    options = {
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_completion_length": 8,
        "bf16": False,
        "disable_tqdm": True,
    }
    theirs = grpo_config(**options, beta=0.1, per_device_train_batch_size=4, num_generations=2)
    with caplog.at_level("WARNING"):
        mine = ESTrainer(model_folder, letters, theirs, dataset, processing_class=make_tokenizer())
    assert "beta=0.1" in caplog.text
    assert isinstance(mine.args, ESConfig) and mine.args.population_size == 30
    mine.train()
    args = ESConfig(theirs.output_dir, use_cpu=True, report_to="none", num_prompts_per_step=2, **options)
    same = ESTrainer(model_folder, letters, args, dataset, processing_class=make_tokenizer())
    same.train()
    assert_same(weights(mine.model), weights(same.model))
