"""What vLLM is told about how to sample."""

from typing import TYPE_CHECKING, Any

from ..config import ESConfig
from .requests import Request
from .sampling import derived_seed


if TYPE_CHECKING:
    from vllm import SamplingParams

# What of `generation_kwargs` vLLM takes
SAMPLING_PARAMS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("stop", "stop_strings", "stop_token_ids", "ignore_eos", "min_tokens"),
    *("logit_bias", "allowed_token_ids", "bad_words", "structured_outputs"),
)
# What of it would fight with how the trainer generates, and what to write instead
REFUSED = {
    "n": "set `num_generations`",
    "max_tokens": "set `max_completion_length`",
    "seed": "completions get seeds that are common to all members",
    "eos_token_id": "give further tokens that end a completion as `stop_token_ids`",
    "pad_token_id": "vLLM needs no padding",
    "bos_token_id": "prompts begin as the tokenizer has them begin",
    "suppress_tokens": "give `logit_bias`, `bad_words` or `allowed_token_ids`",
}


def check_generation_kwargs(args: ESConfig) -> None:
    """
    Raises:
        `ValueError`: If `generation_kwargs` has something that vLLM does not know, or that cannot work; names it and
            the way out.
    """
    for key in args.generation_kwargs or {}:
        if key in REFUSED:
            raise ValueError(f"`generation_kwargs` has {key!r}, which is not supported: {REFUSED[key]}.")
        if key not in SAMPLING_PARAMS:
            raise ValueError(
                f"`generation_kwargs` has {key!r}, which is none of those for `use_vllm=True`: "
                f"{', '.join(SAMPLING_PARAMS)}."
            )


def sampling_options(args: ESConfig, eos_token_ids: list[int]) -> dict[str, Any]:
    """
    Sampling parameters by vLLM's names, the same in a process and over HTTP.

    Args:
        args ([`ESConfig`]):
            Generation parameters.
        eos_token_ids (`list[int]`):
            Every token that ends a completion.
    """
    options = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p or 0.0,
        "repetition_penalty": args.repetition_penalty,
        "max_tokens": args.max_completion_length,
        **(args.generation_kwargs or {}),
    }
    stop = options.pop("stop_strings", None)  # as Transformers calls it
    if stop:
        options["stop"] = stop
    options["stop_token_ids"] = [*eos_token_ids, *options.get("stop_token_ids", [])]
    if args.vllm_structured_outputs_regex is not None:
        options["structured_outputs"] = {"regex": args.vllm_structured_outputs_regex}
    return options


def request_options(options: dict[str, Any], request: Request) -> tuple[dict[str, Any], int | None]:
    """
    Sampling parameters of a request, by vLLM's names, and its seed; `None` if decoding is greedy.

    Args:
        options (`dict[str, Any]`):
            Those of the run.
        request ([`Request`]):
            The request.
    """
    options = {**options, **request.sampling, "max_tokens": request.max_tokens}
    options["min_p"] = options["min_p"] or 0.0
    options["stop"] = [*options.get("stop", []), *request.stop]
    return options, request.seed if options["temperature"] > 0 else None


def sampling_params(options: dict[str, Any], seed: int | None) -> "SamplingParams":
    """
    vLLM's own sampling parameters.

    Args:
        options (`dict[str, Any]`):
            Those of the run or of a request, by vLLM's names; they may have been JSON.
        seed (`int`, *optional*):
            Seed of the completion; `None` if decoding is greedy.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    options = dict(options)
    if "structured_outputs" in options:
        options["structured_outputs"] = StructuredOutputsParams(**options["structured_outputs"])
    if "logit_bias" in options:  # JSON has made texts of the tokens
        options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
    # vLLM looks for texts that end a completion in its own text
    return SamplingParams(**options, seed=seed, detokenize=bool(options.get("stop")))


def common_seed(step: int, prompt: int, number: int) -> int:
    """
    Seed of a completion: the same for every member, which sample with common random numbers.

    Args:
        step (`int`):
            Seed of the step.
        prompt (`int`):
            Number of the prompt.
        number (`int`):
            Which of the prompt's completions it is.
    """
    return derived_seed("sample", step, prompt, number)
