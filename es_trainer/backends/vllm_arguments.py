"""What vLLM refuses, wherever it runs."""

from ..config import ESConfig
from ..engines.vllm_sampling import check_generation_kwargs
from ..fields import require
from .trainer_inputs import TrainerInputs


def check_vllm_arguments(args: ESConfig, inputs: TrainerInputs) -> None:
    """
    Raises:
        `ValueError`: If the config or what the trainer is given asks for something that vLLM cannot do.
    """
    if args.deepspeed_plugin is not None:
        raise ValueError(
            "`use_vllm=True` under DeepSpeed is not supported. Launch with "
            "recipes/accelerate_configs/multi_gpu.yaml, and set `vllm_tensor_parallel_size` to share out the weights "
            "of a model that does not fit into one device."
        )
    require(args, args.cache_implementation is None, "cache_implementation", "vLLM has its own cache; leave it out.")
    require(
        args,
        args.population_batch_size in (None, 1) or args.vllm_lora or inputs.has_adapter,
        "population_batch_size",
        "vLLM evaluates one member at a time; leave it out, or see vllm_lora.",
    )
    require(
        args,
        args.eval_kl_prompts == 0,
        "eval_kl_prompts",
        "it needs logits by Transformers, but vLLM has the weights. Set it to 0, or use_vllm=False.",
    )
    check_generation_kwargs(args)
    if inputs.quantization_config or (args.model_init_kwargs or {}).get("quantization_config"):
        raise ValueError(
            "`quantization_config` with `use_vllm=True` is not supported: vLLM quantizes no model as it loads it. "
            "Give the name of a checkpoint that is quantized already, and a `peft_config`."
        )
