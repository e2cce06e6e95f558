"""What a model answers to a few tokens, to compare ways to compute it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from accelerate.utils import is_peft_model
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from .vocabulary import embedding_rows


if TYPE_CHECKING:
    from peft import PeftModel

LENGTHS = (5, 3, 5)  # tokens of the prompts; numbers that no dimension is likely to be mistaken for
BEGINNING = 2  # tokens of each that may have been read before the others
STEPS = 3  # tokens that are generated

# Of the distance between answers, relative to their size: rounding stays below, an error does not
TOLERANCE = 1e-3
COARSE_TOLERANCE = 0.1  # where something is computed in 16 bits or fewer


class _Recorder(LogitsProcessor):
    """Notes the logits of every step, after which the completions go on with the tokens given."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens
        self.logits: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = self.tokens[:, len(self.logits), None]
        self.logits.append(scores.float())
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


@contextlib.contextmanager
def without_defaults(model: "PreTrainedModel | PeftModel") -> Iterator[PreTrainedModel]:
    """Inside, `generate` fills nothing in from the model's own generation config. Yields the model without adapter."""
    base = model.get_base_model() if is_peft_model(model) else model
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield base
    finally:
        base.generation_config = own


@torch.inference_mode()
def answers(
    model: "PreTrainedModel | PeftModel",
    custom_generate: Callable | None = None,
    inputs: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Logits that follow prompts of `LENGTHS`, which differ in every token, in Transformers' own loop or another.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        custom_generate (`Callable`, *optional*):
            The other loop.
        inputs (`dict[str, torch.Tensor]`, *optional*):
            What the model is to read in place of these prompts: as many others.

    Returns:
        `torch.Tensor` of shape `(prompts, STEPS, vocabulary)`, in float32.
    """
    rows, width = len(LENGTHS), max(LENGTHS)
    vocabulary = embedding_rows(model)
    # From the middle of the vocabulary: special tokens are at its ends
    ids = vocabulary // 4 + torch.arange(rows * (width + STEPS)) * max(1, vocabulary // (2 * rows * (width + STEPS)))
    prompts, tokens = (ids % vocabulary).view(rows, -1).to(model.device).split([width, STEPS], dim=1)
    mask = (torch.arange(width) >= width - torch.tensor(LENGTHS)[:, None]).long().to(model.device)
    recorder = _Recorder(tokens)
    if inputs is None:
        inputs = {"input_ids": prompts.contiguous(), "attention_mask": mask}
    with without_defaults(model) as base:
        base.eval().generate(
            **inputs,
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=STEPS, pad_token_id=0),
            logits_processor=LogitsProcessorList([recorder]),
            custom_generate=custom_generate,
        )
    return torch.stack(recorder.logits, dim=1)


def distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest distance between answers to a prompt, relative to the answer's size."""
    # Tokens that a model never gives have infinite logits
    mine, theirs = (torch.nan_to_num(x, nan=torch.nan, posinf=0.0, neginf=0.0).flatten(1) for x in (mine, theirs))
    return float(((mine - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


def tolerance(model: "PreTrainedModel | PeftModel") -> float:
    """How far answers of the model may be from one another by rounding alone."""
    backend = torch.backends.cuda if model.device.type == "cuda" else torch.backends.mkldnn
    exact = backend.matmul.fp32_precision in ("none", "ieee")  # and not that of TF32 or bfloat16
    exact &= all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())
    return TOLERANCE if exact else COARSE_TOLERANCE
