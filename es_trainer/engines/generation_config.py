"""The generation config of a run: which of the model's own is in effect, and what takes its place."""

import difflib
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..config import ESConfig


# What a model's own generation config says about these is in effect, where the run's settings don't say otherwise:
# which tokens may follow, where completions end, and how they are computed. All else of it is left aside: members are
# compared by one completion of each row, drawn greedily or by the run's own sampling
KEPT = (
    # which tokens may follow
    *("bad_words_ids", "begin_suppress_tokens", "suppress_tokens", "sequence_bias", "no_repeat_ngram_size"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "guidance_scale", "watermarking_config"),
    *("remove_invalid_values", "renormalize_logits"),
    # where completions end
    *("min_length", "min_new_tokens", "stop_strings"),
    # how they are computed
    *("cache_config", "cache_implementation", "compile_config", "disable_compile", "max_cache_len"),
    "prefill_chunk_size",
)

# What of `generation_kwargs` would fight with how the trainer generates, and what to write instead
REFUSED = {
    "do_sample": "`temperature` says it (0.0 is greedy)",
    "num_return_sequences": "set `num_generations`",
    "max_length": "set `max_completion_length`",
    "typical_p": "use `top_p`, `top_k` or `min_p`",
    "epsilon_cutoff": "use `top_p`, `top_k` or `min_p`",
    "eta_cutoff": "use `top_p`, `top_k` or `min_p`",
    "top_h": "use `top_p`, `top_k` or `min_p`",
}


def check_generation_kwargs(args: ESConfig) -> None:
    """
    Raises:
        `ValueError`: If `generation_kwargs` has something that Transformers does not know, or that cannot work; names
            it and the way out.
    """
    known = GenerationConfig().to_dict()
    for key in args.generation_kwargs or {}:
        if key in REFUSED:
            raise ValueError(f"`generation_kwargs` has {key!r}, which is not supported: {REFUSED[key]}.")
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise ValueError(f"`generation_kwargs` has {key!r}, which `GenerationConfig` does not know{hint}")
    if args.has_beams and args.samples:
        raise ValueError("`generation_kwargs` has 'num_beams': beam search needs temperature=0.0.")


def generation_config(
    own: GenerationConfig, tokenizer: PreTrainedTokenizerBase, eos_token_ids: list[int], args: ESConfig
) -> tuple[GenerationConfig, dict[str, Any]]:
    """
    Args:
        own ([`~transformers.GenerationConfig`]):
            The model's own.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a padding token.
        eos_token_ids (`list[int]`):
            Tokens that end completions, with those of `generation_kwargs`.
        args ([`ESConfig`]):
            Settings of the run.

    Returns:
        `tuple[GenerationConfig, dict[str, Any]]`: a config for greedy decoding, and the temperature, top-k, top-p and
        min-p of sampling.
    """
    options = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "max_new_tokens": args.max_completion_length,
        "repetition_penalty": args.repetition_penalty,
        "cache_implementation": args.cache_implementation,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "use_cache": True,
        **(args.generation_kwargs or {}),
        "eos_token_id": eos_token_ids,
        "do_sample": False,
    }
    sampling = {key: options.pop(key) for key in ("temperature", "top_k", "top_p", "min_p")}
    for name in KEPT:
        value = vars(own).get(name)
        if options.get(name) is None and value is not None:
            options[name] = value
    if options["cache_implementation"] == "hybrid":
        options["cache_implementation"] = None  # of older models; Transformers does not follow it any more, either
    return GenerationConfig(**options), sampling
