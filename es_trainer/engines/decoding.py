"""Decoding of many rows at once, where finished rows leave the batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from .population_batch import Rows
from .sampling import CommonRandomNumbers


# Tokens of a forward pass over prompts: enough for full speed; on CPU few enough for activations to stay in the cache
PREFILL_TOKENS = {"cpu": 2048, "cuda": 16384}

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
    """

    rows: list[Row]
    lengths: list[int]
    members: Rows | None = None
    progress: bool = False

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
        options = {key: model_kwargs[key] for key in ("logits_to_keep",) if key in model_kwargs}
        positions = "position_ids" in model_kwargs
        device = input_ids.device
        size, width = input_ids.shape
        total = generation_config.max_length
        lengths = torch.tensor(self.lengths, device=device)
        cache, logits = self._prefill(model, input_ids, total, positions, options)
        mask = None
        if min(self.lengths) < width:
            mask = (torch.arange(total, device=device) >= width - lengths[:, None]).long()

        rows = list(range(size))  # that are still in the batch
        self._assign(rows)
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
                    keep = (~done).nonzero().flatten()
                    rows = [rows[i] for i in keep.tolist()]
                    if not rows:
                        break
                    self._assign(rows)
                    _keep(cache, logits_processor, keep)
                    input_ids, lengths, ends, done = input_ids[keep], lengths[keep], ends[keep], done[keep]
                    mask = mask[keep] if mask is not None else None
                inputs = {"position_ids": (lengths + input_ids.shape[1] - width - 1)[:, None]} if positions else {}
                logits = model(
                    input_ids=input_ids[:, -1:],
                    attention_mask=mask[:, : input_ids.shape[1]] if mask is not None else None,
                    past_key_values=cache,
                    use_cache=True,
                    **inputs,
                    **options,
                ).logits[:, -1]
        return completions

    def _assign(self, rows: list[int]) -> None:
        if self.members is not None:
            self.members.assign([self.rows[i].member for i in rows])

    def _prefill(
        self, model: PreTrainedModel, input_ids: torch.LongTensor, total: int, positions: bool, options: dict
    ) -> tuple[Cache, torch.Tensor]:
        """
        Keys and values of all rows' prompts, with room for `total` tokens, and the logits of their last tokens.

        A prompt of a member is computed once, however many completions it gets, and padded to no more than the longest
        in its forward pass.
        """
        device = input_ids.device
        size, width = input_ids.shape
        layers: list[RowsLayer] = []
        logits = None
        for chunk in self._chunks(PREFILL_TOKENS[device.type]):
            firsts = [copies[0] for copies in chunk]
            self._assign(firsts)
            lengths = torch.tensor([self.lengths[i] for i in firsts], device=device)
            length = int(lengths.max())
            mask = (torch.arange(length, device=device) >= length - lengths[:, None]).long()
            inputs = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positions else {}
            cache = DynamicCache(config=model.config)
            output = model(
                input_ids=input_ids[firsts, width - length :],
                attention_mask=None if mask.all() else mask,
                past_key_values=cache,
                use_cache=True,
                **inputs,
                **options,
            )
            sources = [i for i, copies in enumerate(chunk) for _ in copies]
            targets = [row for copies in chunk for row in copies]
            layers = layers or [RowsLayer(layer, size, width, total) for layer in cache.layers]
            for layer, computed in zip(layers, cache.layers, strict=True):
                layer.put(computed, targets, sources)
            if logits is None:
                logits = output.logits.new_empty(size, output.logits.shape[-1])
            logits[targets] = output.logits[sources, -1]
        return Cache(layers=layers), logits

    def _chunks(self, tokens: int) -> Iterator[list[list[int]]]:
        """The rows with the same prompt and member, in chunks of about as many tokens with prompts of like length."""
        copies: dict[tuple[int, int], list[int]] = {}
        for i, row in enumerate(self.rows):
            copies.setdefault((row.member, row.prompt), []).append(i)
        chunk: dict[tuple[int, int], list[int]] = {}
        for key in sorted(copies, key=lambda key: (self.lengths[copies[key][0]], key[1], key[0])):
            if chunk and (len(chunk) + 1) * self.lengths[copies[key][0]] > tokens:
                yield [chunk[key] for key in sorted(chunk)]
                chunk = {}
            chunk[key] = copies[key]
        yield [chunk[key] for key in sorted(chunk)]


class RowsLayer(DynamicLayer):
    """
    Keys and values of one layer in memory that is allocated once: growing by concatenation would copy all of them for
    every token. Prompts end at the same place; what is before a shorter one is masked. As in Transformers' own cache,
    a layer with a sliding window gives no more than the window: there are models whose mask does not know of it.
    """

    def __init__(self, computed: DynamicLayer, rows: int, width: int, total: int):
        super().__init__()
        self.dtype, self.device = computed.keys.dtype, computed.keys.device
        self.is_sliding = computed.is_sliding
        self.window = computed.sliding_window if computed.is_sliding else total
        self.all_keys, self.all_values = (
            states.new_zeros(rows, states.shape[1], total, states.shape[3])
            for states in (computed.keys, computed.values)
        )
        self.is_initialized = True
        self._view(width)

    def _view(self, length: int) -> None:
        self.length = length
        seen = slice(max(0, length - self.window), length)
        self.keys, self.values = self.all_keys[:, :, seen], self.all_values[:, :, seen]

    def put(self, computed: DynamicLayer, targets: list[int], sources: list[int]) -> None:
        """Take over what was computed for prompts: row `sources[i]` becomes row `targets[i]`."""
        place = slice(self.length - computed.keys.shape[2], self.length)
        self.all_keys[targets, :, place] = computed.keys[sources]
        self.all_values[targets, :, place] = computed.values[sources]

    def update(self, key_states, value_states, *args, **kwargs):
        """Append one token's."""
        self._view(self.length + 1)
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, *args) -> tuple[int, int]:
        """How many keys the next token sees, with its own, and how many are before them."""
        seen = min(self.length + 1, self.window)
        return seen, self.length + 1 - seen

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.all_keys, self.all_values = self.all_keys[indices], self.all_values[indices]
        self._view(self.length)


def _keep(cache: Cache, logits_processor: LogitsProcessorList, rows: torch.Tensor) -> None:
    cache.batch_select_indices(rows)
    for processor in logits_processor:
        if isinstance(processor, CommonRandomNumbers):
            processor.keep(rows.tolist())
        elif isinstance(processor, RepetitionPenaltyLogitsProcessor):
            # Of the processors that `FOLLOWED` makes, only this keeps something for each row
            if isinstance(processor.prompt_ignore_length, torch.Tensor):
                processor.prompt_ignore_length = processor.prompt_ignore_length[rows]
