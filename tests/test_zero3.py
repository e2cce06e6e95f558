import pytest
from accelerate.utils import DeepSpeedPlugin

from es_trainer import deepspeed_config


def plugin(**config) -> DeepSpeedPlugin:
    zero = {"stage": 3, **config.pop("zero_optimization", {})}
    return DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            **config,
        }
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "stage 2, which partitions gradients and optimizer states.*zero_stage: 3",
        ),
        ({"optimizer": {"type": "AdamW"}}, "block `optimizer`.*`es_optimizer`"),
        ({"scheduler": {"type": "WarmupLR"}}, "block `scheduler`.*`lr_scheduler_type`"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "`zero_hpz_partition_size: 8`"),
        ({"zero_optimization": {"mics_shard_size": 4}}, "`mics_shard_size: 4`"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "`zero_quantized_weights: True`"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "'nvme'.*`offload_param_device: cpu`"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "`offload_optimizer`.*master_weights='host'",
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, "`tensor_parallel`"),
        ({"bf16": {"enabled": True}}, "bf16=False"),
    ],
)
def test_settings_that_would_be_wrong_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        deepspeed_config.check(plugin(**config), bf16=False)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bf16": {"enabled": "auto"}},
        {"zero_optimization": {"zero_hpz_partition_size": 1, "mics_shard_size": -1, "zero_quantized_weights": False}},
        {"zero_optimization": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "none"}}},
    ],
)
def test_settings_that_do_no_harm_are_taken(config):
    deepspeed_config.check(plugin(**config), bf16=False)


def test_weights_are_loaded_in_their_own_dtype_and_none_stays_gathered():
    given = plugin(
        bf16={"enabled": True},
        zero_optimization={"stage3_param_persistence_threshold": 100_000, "stage3_max_live_parameters": 7},
    )
    deepspeed_config.prepare(given)
    config = given.deepspeed_config
    assert "bf16" not in config
    zero = config["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == zero["stage3_max_reuse_distance"] == 0
    assert zero["memory_efficient_linear"] is False
    # Of the two that cost or save memory, those that are given
    assert zero["stage3_max_live_parameters"] == 7 and zero["stage3_prefetch_bucket_size"] == 0
