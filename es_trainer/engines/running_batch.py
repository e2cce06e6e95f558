"""Rows that a model reads together, and the keys and values of what each has read."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .population_batch import Rows
from .shared_prefix import shared_prefix


# Tokens of a forward pass over prompts: enough for full speed; on CPU few enough for activations to stay in the cache
PREFILL_TOKENS = {"cpu": 2048, "cuda": 16384}
ROOM = 64  # tokens that there is room for at least when a batch has to grow


@dataclass(frozen=True)
class RowCache:
    """
    Keys and values of tokens that a row has read.

    Args:
        ids (`list[int]`):
            The tokens.
        layers (`list[tuple[torch.Tensor, torch.Tensor]]`):
            Keys and values of each layer, of shape `(heads, tokens, width)`.
    """

    ids: list[int]
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    def prefix_of(self, text: list[int]) -> int:
        """How many tokens of a text, less than all of it, are at the beginning of this."""
        most = min(len(self.ids), len(text) - 1)
        return next((i for i in range(most) if self.ids[i] != text[i]), most)


class RunningBatch:
    """
    Rows that a model reads together, token by token. Rows join and leave between tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, without adapter.
        members ([`Rows`], *optional*):
            Has to be told which members the rows of a forward pass belong to.
    """

    def __init__(self, model: PreTrainedModel, members: Rows | None = None):
        self.model = model
        self.members = members
        taken = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in taken
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self.member_of: list[int] = []  # of each row
        self.texts: list[list[int]] = []  # that each row has read
        self._layers: list[RowsLayer] = []

    def __len__(self) -> int:
        return len(self.texts)

    def join(
        self, texts: list[list[int]], members: list[int], caches: list[RowCache | None], room: int = ROOM
    ) -> torch.Tensor:
        """
        Let rows join the batch.

        A text of a member is computed once, however many rows have it, and padded to no more than the longest in its
        forward pass. So is what all new texts begin with.

        Args:
            texts (`list[list[int]]`):
                Tokens of each row.
            members (`list[int]`):
                Member of each row.
            caches (`list[RowCache]`):
                Keys and values of the beginning of each row, as far as they are known.
            room (`int`, *optional*):
                How many tokens more there is to be room for.

        Returns:
            `torch.Tensor` of shape `(rows, vocabulary)`: the logits of each text's last token.
        """
        old = len(self)
        logits = None
        for rows, beginnings in self._beginnings(texts, members, caches):
            known = [
                0 if cache is None else cache.prefix_of(text) for cache, text in zip(beginnings, texts, strict=True)
            ]
            for chunk in _chunks(rows, texts, members, known, PREFILL_TOKENS[self.model.device.type]):
                firsts = [copies[0] for copies in chunk]
                computed, last = self._read(*([of[i] for i in firsts] for of in (texts, members, known, beginnings)))
                if not self._layers:
                    self._layers = [RowsLayer(layer) for layer in computed.layers]
                if logits is None:
                    self._grow(len(texts), max(map(len, texts)), room)
                    logits = last.new_empty(len(texts), last.shape[-1])
                sources = torch.tensor([i for i, copies in enumerate(chunk) for _ in copies], device=last.device)
                targets = torch.tensor([row for copies in chunk for row in copies], device=last.device)
                columns = _columns([len(texts[i]) for i in firsts], [known[i] for i in firsts], last.device)
                for layer, states in zip(self._layers, computed.layers, strict=True):
                    layer.put(states, old + targets, sources, columns)
                logits[targets] = last[sources]
        self.texts += [list(text) for text in texts]
        self.member_of += members
        self._assign(self.member_of)
        return logits

    def _beginnings(
        self, texts: list[list[int]], members: list[int], caches: list[RowCache | None]
    ) -> Iterator[tuple[list[int], list[RowCache | None]]]:
        """
        Which rows to read next, and all rows' caches, where those that had none have that of what all new texts begin
        with. It is read by as many members at once as a forward pass has room for, and only theirs is kept meanwhile.
        """
        new = [i for i, cache in enumerate(caches) if cache is None]
        prefix = shared_prefix([texts[i] for i in new], [members[i] for i in new])
        if not prefix or any(layer.is_sliding for layer in DynamicCache(config=self.model.config).layers):
            yield list(range(len(texts))), caches
            return
        if len(new) < len(texts):
            yield [i for i, cache in enumerate(caches) if cache is not None], caches
        readers = sorted({members[i] for i in new})
        at_once = max(1, PREFILL_TOKENS[self.model.device.type] // len(prefix))
        for start in range(0, len(readers), at_once):
            group = readers[start : start + at_once]
            computed, _ = self._read([prefix] * len(group), group, [0] * len(group), [None] * len(group))
            read = {
                member: RowCache(prefix, [(layer.keys[row], layer.values[row]) for layer in computed.layers])
                for row, member in enumerate(group)
            }
            yield (
                [i for i in new if members[i] in read],
                [read.get(member) if cache is None else cache for cache, member in zip(caches, members, strict=True)],
            )

    def _read(
        self, texts: list[list[int]], members: list[int], known: list[int], caches: list[RowCache | None]
    ) -> tuple[Cache, torch.Tensor]:
        """
        Keys and values of texts, and the logits of their last tokens. Those known end at one column, and those
        that are computed end at the last one.
        """
        device = self.model.device
        before = max(known)
        width = max(len(text) - k for text, k in zip(texts, known, strict=True))
        ids = torch.zeros(len(texts), width, dtype=torch.long)
        mask = torch.zeros(len(texts), before + width, dtype=torch.long)
        positions = torch.zeros(len(texts), width, dtype=torch.long)
        for i, (text, k) in enumerate(zip(texts, known, strict=True)):
            new = len(text) - k
            ids[i, width - new :] = torch.tensor(text[k:])
            mask[i, before - k : before] = 1
            mask[i, before + width - new :] = 1
            positions[i, width - new :] = torch.arange(k, len(text))
        self._assign(members)
        cache = DynamicCache(config=self.model.config)
        if before:
            for layer in range(len(cache.layers)):
                cache.update(*_beside(caches, known, layer, before), layer)
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=None if mask.all() else mask.to(device),
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": positions.to(device)} if self._takes_positions else {}),
            **self._options,
        )
        return cache, output.logits[:, -1]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """
        Let each row read one token more.

        Args:
            tokens (`torch.Tensor`):
                The tokens, of shape `(rows,)`.

        Returns:
            `torch.Tensor` of shape `(rows, vocabulary)`: the logits of the tokens.
        """
        if self._layers[0].length == self._layers[0].total:
            self._grow(0, 0, max(ROOM, max(map(len, self.texts)) // 4))
        for text, token in zip(self.texts, tokens.tolist(), strict=True):
            text.append(token)
        length = self._layers[0].length + 1
        mask, lengths = None, torch.tensor([len(text) for text in self.texts], device=tokens.device)
        if min(map(len, self.texts)) < length:
            mask = (torch.arange(length, device=tokens.device) >= length - lengths[:, None]).long()
        return self.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            past_key_values=Cache(layers=self._layers),
            use_cache=True,
            **({"position_ids": lengths[:, None] - 1} if self._takes_positions else {}),
            **self._options,
        ).logits[:, -1]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows."""
        self.texts = [self.texts[i] for i in rows]
        self.member_of = [self.member_of[i] for i in rows]
        for layer in self._layers:
            layer.batch_select_indices(torch.tensor(rows, dtype=torch.long, device=layer.device))
        if rows:
            self._assign(self.member_of)

    def cache_of(self, row: int, length: int | None = None) -> RowCache | None:
        """Keys and values of a row's tokens, or of the first ones; `None` if layers keep a window of them only."""
        if any(layer.is_sliding for layer in self._layers):
            return None
        ids = self.texts[row][:length]
        first = self._layers[0].length - len(self.texts[row])
        place = slice(first, first + len(ids))
        return RowCache(
            ids,
            [
                (layer.all_keys[row, :, place].clone(), layer.all_values[row, :, place].clone())
                for layer in self._layers
            ],
        )

    def _assign(self, members: list[int]) -> None:
        if self.members is not None:
            self.members.assign(members)

    def _grow(self, rows: int, longest: int, room: int) -> None:
        """Make room for further rows and tokens."""
        widest = max(map(len, self.texts), default=0)
        end = max(widest, longest)
        for layer in self._layers:
            layer.grow(len(self) + rows, widest, end, end + room)


class RowsLayer(DynamicLayer):
    """
    Keys and values of one layer in memory that is allocated for many tokens: growing by concatenation would copy all
    of them for every token. Rows end at the same place; what is before a shorter one is masked. As in Transformers'
    own cache, a layer with a sliding window gives no more than the window: there are models whose mask does not know
    of it.

    Args:
        computed ([`~transformers.cache_utils.DynamicLayer`]):
            A layer of Transformers' own, whose kind and shape this is of.
    """

    def __init__(self, computed: DynamicLayer):
        super().__init__()
        self.dtype, self.device = computed.keys.dtype, computed.keys.device
        self.is_sliding = computed.is_sliding
        self.window = computed.sliding_window if computed.is_sliding else None
        self.all_keys, self.all_values = (
            states.new_zeros(0, states.shape[1], 0, states.shape[3]) for states in (computed.keys, computed.values)
        )
        self.length = 0
        self.is_initialized = True

    @property
    def total(self) -> int:
        """How many tokens there is room for."""
        return self.all_keys.shape[2]

    def grow(self, rows: int, widest: int, end: int, total: int) -> None:
        """Make room for `rows` rows of `total` tokens. The last `widest` tokens of today's end at `end` then."""
        old = slice(self.length - widest, self.length)
        for name in ("all_keys", "all_values"):
            states = getattr(self, name)
            grown = states.new_zeros(rows, states.shape[1], total, states.shape[3])
            grown[: states.shape[0], :, end - widest : end] = states[:, :, old]
            setattr(self, name, grown)
        self._view(end)

    def _view(self, length: int) -> None:
        self.length = length
        seen = slice(max(0, length - self.window) if self.is_sliding else 0, length)
        self.keys, self.values = self.all_keys[:, :, seen], self.all_values[:, :, seen]

    def put(
        self, computed: DynamicLayer, targets: torch.Tensor, sources: torch.Tensor, columns: torch.Tensor | None
    ) -> None:
        """
        Take over what was computed for texts.

        Args:
            computed ([`~transformers.cache_utils.DynamicLayer`]):
                Has their keys and values.
            targets (`torch.Tensor`):
                Rows that get them.
            sources (`torch.Tensor`):
                Row of `computed` for each of them.
            columns (`torch.Tensor`, *optional*):
                Which columns of each row of `computed` have its tokens. If `None`, the last ones.
        """
        for mine, theirs in ((self.all_keys, computed.keys), (self.all_values, computed.values)):
            if columns is not None:
                index = columns[:, None, :, None].expand(-1, theirs.shape[1], -1, theirs.shape[3])
                theirs = theirs.gather(2, index)
            mine[targets, :, self.length - theirs.shape[2] : self.length] = theirs[sources]

    def update(self, key_states, value_states, *args, **kwargs):
        """Append one token's."""
        self._view(self.length + 1)
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, *args) -> tuple[int, int]:
        """How many keys the next token sees, with its own, and how many are before them."""
        seen = min(self.length + 1, self.window) if self.is_sliding else self.length + 1
        return seen, self.length + 1 - seen

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.all_keys, self.all_values = self.all_keys[indices], self.all_values[indices]
        self._view(self.length)


def _chunks(
    rows: list[int], texts: list[list[int]], members: list[int], known: list[int], tokens: int
) -> Iterator[list[list[int]]]:
    """
    Of some rows, those with the same text, member and known beginning, in chunks of about as many tokens to compute,
    with texts of like length.
    """
    order: dict[tuple[int, ...], int] = {}
    copies: dict[tuple[int, int, int], list[int]] = {}
    for i in rows:
        same = order.setdefault(tuple(texts[i]), len(order))
        copies.setdefault((members[i], same, known[i]), []).append(i)
    width = {key: len(texts[of[0]]) - key[2] for key, of in copies.items()}
    chunk: list[tuple[int, int, int]] = []
    for key in sorted(copies, key=lambda key: (width[key], key[1], key[0])):
        if chunk and (len(chunk) + 1) * width[key] > tokens:
            yield [copies[of] for of in sorted(chunk)]
            chunk = []
        chunk.append(key)
    yield [copies[of] for of in sorted(chunk)]


def _columns(lengths: list[int], known: list[int], device: torch.device) -> torch.Tensor | None:
    """
    Where the last tokens of texts are in what was computed, where the known beginnings end at one column and the rest
    at another. `None` if all are the last columns.
    """
    before = max(known)
    if before == 0:
        return None
    lengths_, known_ = (torch.tensor(values, device=device)[:, None] for values in (lengths, known))
    new = lengths_ - known_
    total = before + int(new.max())
    from_end = torch.arange(max(lengths), 0, -1, device=device)
    columns = torch.where(from_end <= new, total - from_end, before + new - from_end)
    return columns.clamp(min=0)  # before the shorter ones, which are masked


def _beside(
    caches: list[RowCache | None], known: list[int], layer: int, before: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Known keys and values of a layer side by side, so that they end at a column."""
    like = next(cache for cache in caches if cache is not None).layers[layer]
    # Rows that share a beginning have the same cache, which is put in place once
    different = {(id(cache), k): cache for cache, k in zip(caches, known, strict=True)}
    keys, values = (states.new_zeros(len(different), states.shape[0], before, states.shape[2]) for states in like)
    for place, ((_, k), cache) in enumerate(different.items()):
        if k:
            for all_places, own in zip((keys, values), cache.layers[layer], strict=True):
                all_places[place, :, before - k : before] = own[:, :k]
    places = {key: place for place, key in enumerate(different)}
    rows = torch.tensor([places[id(cache), k] for cache, k in zip(caches, known, strict=True)], device=keys.device)
    return keys[rows], values[rows]
