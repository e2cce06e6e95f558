"""A test of whether an engine computes with the weights that are perturbed, or with copies that it has made of them.

Engines pack, absorb and derive weights when they load a model. To find that out takes neither a reference nor a
tolerance: a change of weights that are computed with changes what comes out.
"""

import contextlib
import math
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedTokenizerBase


PREFILL = 32  # tokens of a prompt that is read as a whole
KEPT = 128  # tokens whose keys and values are kept, a whole number of the blocks in which that is done
DECODED = 4  # tokens that are computed one after another
ANSWER = {"temperature": 0.0, "ignore_eos": True, "logprobs": 5}  # what is asked for, by vLLM's names
PIECE = 1 << 24  # weights that noise is made for at once

Logprobs = Callable[[list[int], int, str], list[float]]


@contextlib.contextmanager
def changed(weights: torch.Tensor) -> Iterator[None]:
    """Inside, flat weights are others; afterwards they are, bit for bit, what they were."""
    before = change(weights)
    try:
        yield
    finally:
        weights.copy_(before)


def change(weights: torch.Tensor) -> torch.Tensor:
    """
    Add noise of the weights' own size to flat weights, the same in every process.

    Returns:
        `torch.Tensor`: what they were, in host memory.
    """
    before = weights.to("cpu", copy=True)
    norm = torch.linalg.vector_norm(weights, dtype=torch.promote_types(weights.dtype, torch.float32)).item()
    scale = norm / math.sqrt(max(1, weights.numel())) or 1.0
    generator = torch.Generator(weights.device).manual_seed(0)
    for piece in weights.split(PIECE):
        noise = torch.randn(piece.shape, generator=generator, dtype=piece.dtype, device=piece.device)
        piece.add_(noise, alpha=scale)
    return before


def without_effect(
    names: Sequence[str],
    changed: Callable[[str], AbstractContextManager[None]],
    logprobs: Logprobs,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
) -> list[str]:
    """
    Find weights that the engine does not compute with.

    One of each kind (of the names that differ in numbers only) is changed, alone; biases go with the weights of their
    layers, as softmax takes no notice of what is added to all keys. Then a short prompt is read as a whole, and of a
    long one the last token only, with the keys and values that the unchanged weights have given for all before it:
    that is how completions go on, for which some engines have copies of their own.

    Args:
        names (`Sequence[str]`):
            Names of parameters.
        changed (`Callable[[str], AbstractContextManager[None]]`):
            Inside of which the engine's weights of a parameter are others.
        logprobs (`Callable[[list[int], int, str], list[float]]`):
            The highest log probabilities of so many tokens after a prompt, as `ANSWER` asks for them, computed with
            the keys and values of the prompt that the engine has kept under a text (vLLM's `cache_salt`), if it has.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        context (`int`):
            Most tokens that the engine takes.

    Returns:
        `list[str]`: What was found, a sentence for each parameter.
    """
    ids = tokenizer(text=" ".join(map(str, range(KEPT))))["input_ids"] * KEPT
    short, long = (ids[: min(length, context - DECODED)] for length in (PREFILL, KEPT + 1))
    kept = uuid.uuid4().hex

    def outputs() -> dict[str, list[float]]:
        return {"prefill": logprobs(short, 1, uuid.uuid4().hex), "decoding": logprobs(long, DECODED, kept)}

    outputs()  # after which the keys and values are there
    before, again = outputs(), outputs()
    found = []
    for name in _one_of_each_kind(name for name in names if not name.endswith(".bias")):
        with changed(name):
            after = outputs()
        # Where a computation is not repeatable, any difference that it makes by itself says nothing
        dead = [part for part in after if _distance(before[part], after[part]) <= _distance(before[part], again[part])]
        if dead:
            found.append(f"a change of {name} has no effect on {' and '.join(dead)}")
    return found


def _one_of_each_kind(names: Iterable[str]) -> list[str]:
    """The first of the names that differ in numbers only: of layers, of experts."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(re.sub(r"(?<=[.])\d+(?=[.])", "*", name), name)
    return list(first.values())


def _distance(one: list[float], other: list[float]) -> float:
    return max(abs(mine - theirs) for mine, theirs in zip(one, other, strict=True))
