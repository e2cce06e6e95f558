"""Where the weights are, how a member gets in, and who answers: a file for each way."""

from transformers import Trainer

from ..config import ESConfig
from ..run.processes import Processes
from .answers import Answers, RolloutFuncAnswers
from .base import Backend
from .evaluation import evaluate_batches, evaluate_population
from .results import Prompts, Result
from .rollout_func import RolloutFunc


__all__ = ["Backend", "Prompts", "Result", "RolloutFunc", "evaluate_batches", "evaluate_population", "pick"]


def pick(
    args: ESConfig, processes: Processes, source: str | None, rollout_func: RolloutFunc | None, trainer: Trainer
) -> Backend:
    """
    The backend of a run. Nothing else reads which mode the config asks for.

    Args:
        args ([`ESConfig`]):
            The config.
        processes ([`Processes`]):
            Those of the run.
        source (`str`, *optional*):
            Name or folder of the model, if it was given by that.
        rollout_func (`Callable`, *optional*):
            Function that generates the completions.
        trainer ([`~transformers.Trainer`]):
            What such a function gets.
    """
    if rollout_func is not None:
        answers = RolloutFuncAnswers(rollout_func, trainer)
    else:
        answers = Answers(args, progress=not args.disable_tqdm and processes.rank == 0)
    return _kind(args)(args, processes, answers, source)


def _kind(args: ESConfig) -> type[Backend]:
    # Each is imported where it is used: a run needs one
    if args.use_vllm and args.vllm_mode == "server":
        from .servers import Servers

        return Servers
    if args.use_vllm:
        from .vllm import VLLM, VLLMLoRA

        return VLLMLoRA if args.vllm_lora else VLLM
    if args.deepspeed_plugin is not None:
        from .zero3 import Gathered, Lockstep

        return Gathered if args.ds3_gather_for_generation else Lockstep
    from .local import Local

    return Local
