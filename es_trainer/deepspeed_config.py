"""The DeepSpeed config: what of it is refused, and what follows from how weights are used here."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from accelerate.utils import DeepSpeedPlugin


# Options of `zero_optimization` under which the weights are not what they seem, and what to write
REFUSED = {
    "zero_hpz_partition_size": "its second copies of the weights would not be perturbed; leave it out",
    "mics_shard_size": "its groups of processes are not supported; leave it out",
    "zero_quantized_weights": "weights would be rounded on their way; leave it out",
    "zero_quantized_nontrainable_weights": "weights would be rounded on their way; leave it out",
}


def do_without_compiler() -> None:
    """Keep DeepSpeed from building its operator for messages in shared memory, which takes a compiler and half a
    minute, when processes run on CPU. Gloo does the same."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def unpartitioned() -> Iterator[None]:
    """Inside, `from_pretrained` loads whole models also where the weights to train are partitioned."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def check(plugin: "DeepSpeedPlugin", bf16: bool) -> None:
    """
    Look through a DeepSpeed config before anything is loaded.

    Args:
        plugin ([`~accelerate.utils.DeepSpeedPlugin`]):
            Has the config.
        bf16 (`bool`):
            Whether the working weights are to be bfloat16.

    Raises:
        `ValueError`: If something in it would do harm or is without effect; says what to write.
    """
    config = plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage != 3:
        raise ValueError(
            f"The DeepSpeed config has ZeRO stage {stage}, which partitions gradients and optimizer states: evolution "
            "strategies have none. Write `zero_stage: 3` to partition the weights, or use "
            "recipes/accelerate_configs/multi_gpu.yaml if they fit into one device."
        )
    for block, field in (("optimizer", "es_optimizer"), ("scheduler", "lr_scheduler_type")):
        if block in config:
            raise ValueError(
                f"The DeepSpeed config has a block `{block}`, but the evolution strategy is the optimizer. Remove the "
                f"block and choose with `{field}` and `learning_rate` of `ESConfig`."
            )
    for option, reason in REFUSED.items():
        value = zero.get(option)
        if value is True or value not in (None, False, -1, 0, 1):  # which say "not used"
            raise ValueError(f"The DeepSpeed config has `{option}: {value}`, which is refused: {reason}.")
    if _device(zero, "offload_param") == "nvme":
        raise ValueError(
            "The DeepSpeed config has `offload_param` with device 'nvme', which is refused: every member writes all "
            "weights. Write `offload_param_device: cpu`, or use more processes."
        )
    if _device(zero, "offload_optimizer") != "none":
        raise ValueError(
            f"The DeepSpeed config has `offload_optimizer` with device {_device(zero, 'offload_optimizer')!r}, but "
            "there is no DeepSpeed optimizer. Write `offload_optimizer_device: none`, and `master_weights='host'` in "
            "`ESConfig` to keep the masters in host memory."
        )
    if config.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
        raise ValueError("The DeepSpeed config has `tensor_parallel`, which is refused: leave it out.")
    if config.get("bf16", {}).get("enabled") is True and not bf16:
        raise ValueError(
            "The DeepSpeed config (or accelerate's `mixed_precision`) enables bf16, but `ESConfig` has bf16=False: "
            "`ESConfig` chooses the dtype of the working weights, so set both alike."
        )


def _device(zero: dict[str, Any], block: str) -> str:
    return (zero.get(block) or {}).get("device") or "none"


def prepare(plugin: "DeepSpeedPlugin") -> None:
    """Set what follows from how the weights are used, in the configs that DeepSpeed and Transformers read."""
    from transformers.integrations.deepspeed import deepspeed_config

    for config in (plugin.deepspeed_config, deepspeed_config()):
        if config is None:
            continue
        # Weights are loaded in their own dtype, which the masters are made of, and cast afterwards
        config.pop("bf16", None)
        config.pop("fp16", None)
        zero = config["zero_optimization"]
        zero.update(
            # For backward passes; it takes the place of torch's linear and rounds differently
            memory_efficient_linear=False,
            # A parameter that stays gathered would keep the last member's values
            stage3_param_persistence_threshold=0,
            stage3_max_reuse_distance=0,
        )
        for option in ("stage3_max_live_parameters", "stage3_prefetch_bucket_size"):
            # DeepSpeed's defaults would gather all of a small model ahead
            if zero.get(option, "auto") == "auto":
                zero[option] = 0
