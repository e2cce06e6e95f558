"""Decoding of many rows at once, where finished rows leave the batch."""

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from .population_batch import Rows
from .running_batch import RowCache, RunningBatch
from .sampling import CommonRandomNumbers


# Options that `Decoding` follows. With any other, of later versions too, Transformers' own loop decodes: it has beams
# and the like, and logits processors that keep something of each row
FOLLOWED = (
    # which tokens may follow
    *("bad_words_ids", "begin_suppress_tokens", "suppress_tokens", "sequence_bias", "no_repeat_ngram_size"),
    *("repetition_penalty", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("remove_invalid_values", "renormalize_logits", "bos_token_id", "pad_token_id"),
    # where completions end
    *("eos_token_id", "max_new_tokens", "max_time", "min_length", "min_new_tokens"),
    # of caches that it does not have
    *("cache_config", "disable_compile", "max_cache_len"),
)
# Values of other options that ask for nothing
NEUTRAL = {
    "cache_implementation": "dynamic",
    "do_sample": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "num_beams": 1,
    "use_cache": True,
}

FINISHED_SHARE = 1 / 8  # of the rows that makes it worth to copy the others together


def follows(config: GenerationConfig) -> bool:
    """Whether `Decoding` does all that a config for greedy decoding asks for."""
    unset = vars(GenerationConfig())
    return all(
        name in FOLLOWED or value == unset.get(name) or value == NEUTRAL.get(name)
        for name, value in vars(config).items()
    )


@dataclass(frozen=True)
class Row:
    """A completion to be made: of which member, for which prompt, and which of the prompt's completions."""

    member: int
    prompt: int
    number: int


@dataclass
class Decoding:
    """
    Greedy decoding of a batch, to be given to `generate` as `custom_generate`.

    Args:
        rows (`list[Row]`):
            What each row of the batch is.
        lengths (`list[int]`):
            Length of each row's prompt, without padding.
        members ([`Rows`], *optional*):
            Has to be told which members the rows of a forward pass belong to.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a bar of the tokens.
        caches (`dict[Row, RowCache | None]`, *optional*):
            Keys and values of the rows' tokens that were read earlier. Takes those of the tokens that are read now.
    """

    rows: list[Row]
    lengths: list[int]
    members: Rows | None = None
    progress: bool = False
    caches: dict[Row, RowCache | None] | None = None

    @torch.inference_mode()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> list[list[int]]:
        """Tokens of each row's completion, as many as `stopping_criteria` let it have."""
        batch = RunningBatch(model, self.members)
        device = input_ids.device
        size, width = input_ids.shape
        total = generation_config.max_length
        logits = batch.join(
            [ids[width - length :] for ids, length in zip(input_ids.tolist(), self.lengths, strict=True)],
            [row.member for row in self.rows],
            [self.caches.get(row) if self.caches else None for row in self.rows],
            room=total - width,
        )
        rows = list(range(size))  # that are still in the batch
        completions: list[list[int]] = [[] for _ in rows]
        done = torch.zeros(size, dtype=torch.bool, device=device)
        ends = torch.full((size,), total, device=device)
        with tqdm(
            total=total - width, desc="Tokens", leave=False, position=2, dynamic_ncols=True, disable=not self.progress
        ) as bar:
            while True:
                scores = logits_processor(input_ids, logits.float()) if logits_processor else logits
                input_ids = torch.cat([input_ids, scores.max(-1, keepdim=True).indices], dim=1)  # faster than argmax
                ends[~done] = input_ids.shape[1]
                done |= stopping_criteria(input_ids, scores)
                bar.update()
                if int(done.sum()) >= FINISHED_SHARE * len(rows):
                    for i in done.nonzero().flatten().tolist():
                        completions[rows[i]] = input_ids[i, width : ends[i]].tolist()
                        if self.caches is not None:
                            row, new = rows[i], len(completions[rows[i]])
                            # The last token was not read
                            self.caches[self.rows[row]] = batch.cache_of(i, self.lengths[row] + new - 1)
                    keep = (~done).nonzero().flatten()
                    rows = [rows[i] for i in keep.tolist()]
                    if not rows:
                        break
                    batch.keep(keep.tolist())
                    _keep(logits_processor, keep)
                    input_ids, ends, done = input_ids[keep], ends[keep], done[keep]
                logits = batch.step(input_ids[:, -1])
        return completions


def _keep(logits_processor: LogitsProcessorList, rows: torch.Tensor) -> None:
    for processor in logits_processor:
        if isinstance(processor, CommonRandomNumbers):
            processor.keep(rows.tolist())
        elif isinstance(processor, RepetitionPenaltyLogitsProcessor):
            # Of the processors that `FOLLOWED` makes, only this keeps something for each row
            if isinstance(processor.prompt_ignore_length, torch.Tensor):
                processor.prompt_ignore_length = processor.prompt_ignore_length[rows]
