"""A test of whether an engine computes with the weights that are perturbed, or with copies that it has made of them.

Engines pack, absorb and derive weights when they load a model. The test needs neither a reference nor a tolerance: if
the engine computes with weights, then other weights give other log probabilities.
"""

import contextlib
import math
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedTokenizerBase


PREFILL_TOKENS = 32  # of a prompt that is computed as a whole
CACHED_TOKENS = 128  # of a prompt whose keys and values are cached: a whole number of vLLM's blocks
DECODED_TOKENS = 4
PROBE_SAMPLING = {"temperature": 0.0, "ignore_eos": True, "logprobs": 5}  # by vLLM's names
CHUNK = 1 << 24  # weights that noise is made for at once

Logprobs = Callable[[list[int], int, str], list[float]]


@contextlib.contextmanager
def overwritten(weights: torch.Tensor) -> Iterator[None]:
    """Inside, flat weights have other values; afterwards their own again, bit for bit."""
    before = overwrite(weights)
    try:
        yield
    finally:
        weights.copy_(before)


def overwrite(weights: torch.Tensor) -> torch.Tensor:
    """
    Add noise of the weights' own size to flat weights, the same in every process.

    Returns:
        `torch.Tensor`: the values before, in host memory.
    """
    before = weights.to("cpu", copy=True)
    norm = torch.linalg.vector_norm(weights, dtype=torch.promote_types(weights.dtype, torch.float32)).item()
    scale = norm / math.sqrt(max(1, weights.numel())) or 1.0
    generator = torch.Generator(weights.device).manual_seed(0)
    for chunk in weights.split(CHUNK):
        noise = torch.randn(chunk.shape, generator=generator, dtype=chunk.dtype, device=chunk.device)
        chunk.add_(noise, alpha=scale)
    return before


def find_unused_weights(
    names: Sequence[str],
    overwritten: Callable[[str], AbstractContextManager[None]],
    logprobs: Logprobs,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
) -> list[str]:
    """
    Find weights that the engine does not compute with.

    Of the parameters whose names differ in numbers only, the first is overwritten, alone. Biases are left out, as
    softmax takes no notice of what is added to all keys. Then the log probabilities are compared for a short prompt
    that is computed as a whole (prefill), and for a long prompt whose keys and values are cached from before, so that
    only the last token is computed (decoding). Some engines have copies of weights for one of the two.

    Args:
        names (`Sequence[str]`):
            Names of parameters.
        overwritten (`Callable[[str], AbstractContextManager[None]]`):
            Given a parameter's name, a context inside of which the engine's weights of it have other values.
        logprobs (`Callable[[list[int], int, str], list[float]]`):
            Given a prompt, a number of tokens and a salt of the prefix cache (vLLM's `cache_salt`), the highest log
            probabilities of the tokens after the prompt, sampled by `PROBE_SAMPLING`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        context (`int`):
            Context length of the engine.

    Returns:
        `list[str]`: A sentence for each parameter that the engine does not compute with.
    """
    ids = tokenizer(text=" ".join(map(str, range(CACHED_TOKENS))))["input_ids"] * CACHED_TOKENS
    short, long = (ids[: min(length, context - DECODED_TOKENS)] for length in (PREFILL_TOKENS, CACHED_TOKENS + 1))
    salt = uuid.uuid4().hex

    def outputs() -> dict[str, list[float]]:
        return {"prefill": logprobs(short, 1, uuid.uuid4().hex), "decoding": logprobs(long, DECODED_TOKENS, salt)}

    outputs()  # fills the cache
    return find_weights_without_effect(names, overwritten, outputs)


def find_weights_without_effect(
    names: Sequence[str],
    overwritten: Callable[[str], AbstractContextManager[None]],
    outputs: Callable[[], dict[str, list[float]]],
) -> list[str]:
    """
    Find weights that have no effect on outputs of the engine, one of each kind, as [`find_unused_weights`] does.

    Args:
        outputs (`Callable[[], dict[str, list[float]]]`):
            Log probabilities, by what they are of. The rest is as with [`find_unused_weights`].
    """
    before, again = outputs(), outputs()
    found = []
    for name in _one_of_each_kind(name for name in names if not name.endswith(".bias")):
        with overwritten(name):
            after = outputs()
        # An engine that is not deterministic gives other outputs for the same weights, too
        unused = [key for key in after if _distance(before[key], after[key]) <= _distance(before[key], again[key])]
        if unused:
            found.append(f"a change of {name} has no effect on {' and '.join(unused)}")
    return found


def _one_of_each_kind(names: Iterable[str]) -> list[str]:
    """The first of the names that differ in numbers only, which are those of layers and of experts."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(re.sub(r"(?<=[.])\d+(?=[.])", "*", name), name)
    return list(first.values())


def _distance(one: list[float], other: list[float]) -> float:
    return max(abs(mine - theirs) for mine, theirs in zip(one, other, strict=True))
