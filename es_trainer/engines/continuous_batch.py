"""Continuous batching: requests to any members join and leave the running batch between tokens."""

import copy
from collections import deque

import torch
from transformers import LogitsProcessorList

from . import trial
from .base import Engine
from .decoding import FINISHED_SHARE
from .not_numbers import NOT_NUMBERS
from .population_batch import Rows
from .requests import Request
from .running_batch import RunningBatch
from .sampling import CommonRandomNumbers, sampling_processors


class ContinuousBatch:
    """
    Answers requests as they come.

    Args:
        engine ([`TransformersEngine`]):
            Has the model and the generation parameters of the run.
        members ([`Rows`], *optional*):
            The group of members that is installed in the model.
        most_rows (`int`, *optional*):
            Most requests that are answered at once. Others wait.

    Raises:
        `ValueError`: If the model generates by Transformers' own loop only.
    """

    def __init__(self, engine: Engine, members: Rows | None, most_rows: int | None = None):
        engine.use(members)
        if not engine.drops_finished_rows:
            raise ValueError(
                f"{type(engine.model).__name__} cannot answer requests as they come: Transformers' own loop has to "
                "generate, because the model keeps what it has read elsewhere than in the cache that it is given, or "
                "`generation_kwargs` or `cache_implementation` asks for it. Leave these out, or take another model."
            )
        self.engine = engine
        self.most_rows = most_rows
        self.waiting: deque[Request] = deque()
        with trial.without_defaults(engine.model) as base:
            self._batch = RunningBatch(base, members)
            self._config = copy.deepcopy(engine.generation_config)
            base._prepare_special_tokens(self._config, device=base.device)
        self._rows: list[Request | None] = []  # of the batch; `None` where one has ended
        self._processors: list[LogitsProcessorList | None] = []
        self._logits: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.waiting) + sum(request is not None for request in self._rows)

    def add(self, request: Request) -> None:
        """Answer a request from the next token on."""
        self.waiting.append(request)

    @torch.inference_mode()
    def step(self) -> None:
        """
        Generate a token for each request, and tell those who asked.

        Raises:
            `FloatingPointError`: If logits are NaN.
        """
        self._drop_cancelled()
        if self._rows:
            self._logits = self._logits[self._compact()]
        self._let_join()
        running = [request for request in self._rows if request is not None]
        if not running:
            return
        tokens = self._choose()
        for row, (request, token) in enumerate(zip(self._rows, tokens.tolist(), strict=True)):
            if request is not None:
                self._take(row, request, token)
        for request in running:
            request.tell(self.engine.tokenizer)
        tokens = tokens[self._compact()]
        if len(self._rows):
            self._logits = self._batch.step(tokens)

    def close(self) -> None:
        """Drop the requests that have not ended."""
        self.waiting.clear()
        self._rows, self._processors = [], []

    def _drop_cancelled(self) -> None:
        self.waiting = deque(request for request in self.waiting if not request.cancelled)
        self._rows = [None if request is None or request.cancelled else request for request in self._rows]

    def _let_join(self) -> None:
        free = len(self.waiting) if self.most_rows is None else self.most_rows - len(self._rows)
        joining = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        if not joining:
            return
        logits = self._batch.join(
            [request.ids for request in joining],
            [request.member for request in joining],
            [request.cache for request in joining],
        )
        for request in joining:
            request.cache = None
        self._logits = logits if not self._rows else torch.cat([self._logits, logits])
        self._rows += joining
        self._processors += [self._make_processors(request) for request in joining]

    def _make_processors(self, request: Request) -> LogitsProcessorList | None:
        """What turns a row's logits into its next token under argmax; `None` if that is what they are."""
        processors = self._batch.model._get_logits_processor(
            generation_config=self._config, input_ids_seq_length=len(request.ids), device=self._batch.model.device
        )
        if request.sampling["temperature"] > 0:
            random_numbers = CommonRandomNumbers(request.seed, [(0, 0)], len(request.ids))
            processors += sampling_processors(**request.sampling, random_numbers=random_numbers)
        return processors or None

    def _choose(self) -> torch.Tensor:
        if self._logits.amax(-1).isnan().any():
            raise FloatingPointError(NOT_NUMBERS)
        tokens = self._logits.max(-1).indices
        for row, (request, processors) in enumerate(zip(self._rows, self._processors, strict=True)):
            if request is not None and processors is not None:
                ids = torch.tensor([request.ids + request.new], device=tokens.device)
                tokens[row] = processors(ids, self._logits[row : row + 1].float()).argmax()
        return tokens

    def _take(self, row: int, request: Request, token: int) -> None:
        """Go on with a token, or end."""
        request.new.append(token)
        stopped = bool(request.stop) and request.decode(self.engine.tokenizer)
        if stopped or token in self.engine.eos_token_ids:
            request.finish_reason = "stop"
        elif len(request.new) == request.max_tokens:
            request.finish_reason = "length"
        else:
            return
        request.cache = self._batch.cache_of(row)  # without the last token, which was not read
        self._rows[row] = None

    def _compact(self) -> torch.Tensor:
        """Let rows that have ended leave the batch, where that is worth it; which rows stay."""
        ended = self._rows.count(None)
        if ended and (ended >= FINISHED_SHARE * len(self._rows) or self.waiting):
            keep = [row for row, request in enumerate(self._rows) if request is not None]
        else:
            keep = list(range(len(self._rows)))
        if len(keep) < len(self._rows):
            self._batch.keep(keep)
            self._rows = [self._rows[row] for row in keep]
            self._processors = [self._processors[row] for row in keep]
        return torch.tensor(keep, dtype=torch.long, device=self._batch.model.device)
