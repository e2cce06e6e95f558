"""What vLLM is told about how to sample."""

import hashlib
from typing import Any

from ..config import ESConfig


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
    if "logit_bias" in options:  # JSON has made texts of the tokens
        options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
    options["stop_token_ids"] = [*eos_token_ids, *options.get("stop_token_ids", [])]
    if args.vllm_structured_outputs_regex is not None:
        options["structured_outputs"] = {"regex": args.vllm_structured_outputs_regex}
    return options


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
    digest = hashlib.blake2b(f"sample/{step}/{prompt}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # a positive int64
