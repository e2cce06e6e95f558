"""Where the weights are, how a member gets in, and who answers: a file for each way."""

from transformers import Trainer

from ..config import ESConfig
from ..fields import require
from ..run.processes import Processes
from .agent_answers import AgentAnswers
from .answers import Answers, RolloutFuncAnswers
from .base import Backend
from .drift import Drift
from .evaluation import evaluate_batches, evaluate_population
from .initial_weights import check_anchor_weights
from .results import Prompts, Result
from .rollout_func import RolloutFunc
from .tool_answers import ToolAnswers
from .trainer_inputs import TrainerInputs


__all__ = [
    "Backend",
    "Drift",
    "TrainerInputs",
    "Prompts",
    "Result",
    "RolloutFunc",
    "check_mode",
    "evaluate_batches",
    "evaluate_population",
    "pick",
]


def pick(args: ESConfig, inputs: TrainerInputs, processes: Processes, trainer: Trainer) -> Backend:
    """
    The backend of a run. Nothing else reads which mode the config asks for.

    Args:
        args ([`ESConfig`]):
            The config.
        inputs ([`TrainerInputs`]):
            What the trainer was given beside it.
        processes ([`Processes`]):
            Those of the run.
        trainer ([`~transformers.Trainer`]):
            What a `rollout_func` gets.
    """
    progress = not args.disable_tqdm and processes.rank == 0
    answers: Answers
    if inputs.rollout_func is not None:
        answers = RolloutFuncAnswers(args, inputs.rollout_func, trainer)
    elif inputs.agent_func is not None:
        answers = AgentAnswers(args, inputs.agent_func, processes, progress)
    elif inputs.has_turns:
        answers = ToolAnswers(args, inputs.tools, inputs.environments, progress)
    else:
        answers = Answers(args, progress)
    return _kind(args, inputs)(args, processes, answers, inputs.source)


def check_mode(args: ESConfig, inputs: TrainerInputs) -> None:
    """
    Look through what the mode of a config can refuse, before anything is loaded.

    Args:
        args ([`ESConfig`]):
            The config.
        inputs ([`TrainerInputs`]):
            What the trainer is given beside it.

    Raises:
        `ValueError` or `TypeError`: If something cannot work; names it and the way out.
        `ImportError`: If a package is missing.
    """
    require(args, args.use_vllm or not args.vllm_lora, "vllm_lora", "it needs use_vllm=True.")
    known = not args.use_vllm or args.vllm_mode in ("colocate", "server")
    require(args, known, "vllm_mode", "choose one of 'colocate', 'server'.")
    require(
        args,
        args.weight_quantization is None or not (args.use_vllm or args.deepspeed_plugin),
        "weight_quantization",
        "it is for Transformers' engine with all weights in each process: leave out use_vllm and DeepSpeed, or set it "
        "to None. (vLLM can have a quantized base model under an adapter: give `peft_config`.)",
    )
    _kind(args, inputs).check_arguments(args, inputs)
    check_anchor_weights(args, inputs)
    if inputs.rollout_func is not None:
        RolloutFuncAnswers.check_arguments(args, inputs)
    if inputs.agent_func is not None:
        AgentAnswers.check_arguments(args, inputs)


def _kind(args: ESConfig, inputs: TrainerInputs) -> type[Backend]:
    # Each is imported where it is used: a run needs one
    if args.use_vllm:
        if args.vllm_mode == "server" and inputs.has_adapter:
            from .servers_adapter import ServersAdapter

            return ServersAdapter
        if args.vllm_mode == "server" and args.vllm_lora:
            from .servers_lora import ServersLoRA

            return ServersLoRA
        if args.vllm_mode == "server":
            from .servers import Servers

            return Servers
        if inputs.has_adapter:
            from .vllm_adapter import VLLMAdapter

            return VLLMAdapter
        if args.vllm_lora:
            from .vllm_lora import VLLMLoRA

            return VLLMLoRA
        from .vllm import VLLM

        return VLLM
    if args.deepspeed_plugin is not None:
        from .zero3 import Gathered, Lockstep

        return Gathered if args.ds3_gather_for_generation else Lockstep
    if args.weight_quantization is not None:
        from .quantized import QuantizedLocal

        return QuantizedLocal
    from .local import Local

    return Local
