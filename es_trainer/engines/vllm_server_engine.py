"""One vLLM server as an engine, while it has the weights of a member or the unperturbed ones."""

import queue
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import ESConfig
from ..rollout import Completion
from .base import Engine
from .decoding import Row
from .requests import Request
from .vllm_client import VLLMClient
from .vllm_sampling import common_seed, request_options, sampling_options


PATIENCE = 0.01  # seconds that a step waits for an answer
MOST_CONNECTIONS = 256


class VLLMServerEngine(Engine):
    """
    Generates on one server.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, without weights.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. Servers are talked to in threads, so each has its own.
        args ([`ESConfig`]):
            Generation parameters.
        server ([`VLLMClient`]):
            The server.
        context (`int`):
            Most tokens that it reads.
        share (`tuple[int, int]`):
            Which share of the prompts it completes, of how many.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: ESConfig,
        server: VLLMClient,
        context: int,
        share: tuple[int, int] = (0, 1),
    ):
        super().__init__(model, tokenizer, args)
        self.server = server
        self.context = context
        self.share = share
        self.sampling = sampling_options(args, self.eos_token_ids)
        self.max_new_tokens = self.sampling["max_tokens"]

    def prompt_shard(self, num_prompts: int) -> range:
        """Numbers of the prompts that this server completes: those that lie together, as it completes them."""
        number, count = self.share
        size = -(-num_prompts // count)
        return range(min(number * size, num_prompts), min((number + 1) * size, num_prompts))

    def complete(
        self,
        ids: list[list[int]],
        rows: list[Row],
        seed: int,
        members: Sequence[str | None] | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        caches: dict[str, str] | None = None,
    ) -> list[Completion]:
        """
        Complete rows that have a text of their own each; see [`TransformersEngine.complete`].

        Args:
            members (`Sequence[str | None]`, *optional*):
                Names of the adapters that the members are. `None` generates with the weights as they are.
            caches (`dict[str, str]`, *optional*):
                What calls for earlier turns with the same weights have left here: the salt of vLLM's prefix cache.
        """
        samples = self.sampling["temperature"] > 0
        seeds = [common_seed(seed, row.prompt, row.number) if samples else None for row in rows]
        salt = None if caches is None else caches.setdefault("salt", uuid.uuid4().hex)
        choices = self._choices(ids, seeds, salt, [None if members is None else members[row.member] for row in rows])
        return [self._completion(choice["token_ids"], choice["finish_reason"] == "length") for choice in choices]

    def _choices(
        self, ids: list[list[int]], seeds: list[int | None], salt: str | None, adapters: list[str | None]
    ) -> list[dict[str, Any]]:
        """What the server completes, with the adapter of each row; a request has one adapter."""
        rows = {adapter: [row for row, own in enumerate(adapters) if own == adapter] for adapter in adapters}

        def complete(adapter: str | None) -> list[dict[str, Any]]:
            of_rows = [[values[row] for row in rows[adapter]] for values in (ids, seeds)]
            return self.server.complete(of_rows[0], self.options(adapter), of_rows[1], salt)

        with ThreadPoolExecutor(len(rows)) as threads:  # vLLM batches the requests
            found = dict(zip(rows, threads.map(complete, rows), strict=True))
        return [found[adapter][rows[adapter].index(row)] for row, adapter in enumerate(adapters)]

    def options(self, adapter: str | None) -> dict[str, Any]:
        """Sampling parameters of a request for an adapter, or for the weights as they are."""
        return self.sampling if adapter is None else {**self.sampling, "model": adapter}

    def requests(self, members: Sequence[str | None] | None = None, most_rows: int | None = None) -> "ServerRequests":
        """
        Requests that are answered as they come; see [`TransformersEngine.requests`].

        Args:
            members (`Sequence[str | None]`, *optional*):
                Names of the adapters that the members are.
            most_rows (`int`, *optional*):
                Most requests that are sent at once.
        """
        return ServerRequests(self, most_rows or MOST_CONNECTIONS, members)


class ServerRequests:
    """
    Sends each request to a server, which batches them. Texts are known in the end only.

    Args:
        engine ([`VLLMServerEngine`]):
            The server.
        most (`int`):
            Most requests that are sent at once.
        members (`Sequence[str | None]`, *optional*):
            Names of the adapters that the members are.
    """

    def __init__(self, engine: VLLMServerEngine, most: int, members: Sequence[str | None] | None = None):
        self.engine = engine
        self.members = members
        self._salt = uuid.uuid4().hex
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="es_trainer-requests")
        self._answered: queue.SimpleQueue[tuple[Request, Any]] = queue.SimpleQueue()
        self._under_way = 0

    def __len__(self) -> int:
        return self._under_way

    def add(self, request: Request) -> None:
        """Answer a request."""
        self._under_way += 1
        self._threads.submit(self._ask, request)

    def _ask(self, request: Request) -> None:
        try:
            if request.cancelled:
                answer: Any = None
            else:
                adapter = None if self.members is None else self.members[request.member]
                options, seed = request_options(self.engine.options(adapter), request)
                (answer,) = self.engine.server.complete([request.ids], options, [seed], self._salt)
        except Exception as error:
            answer = error
        self._answered.put((request, answer))

    def step(self) -> None:
        """
        Wait a moment for answers.

        Raises:
            [`ServerLost`]: If the server is lost.
        """
        try:
            request, answer = self._answered.get(timeout=PATIENCE)
        except queue.Empty:
            return
        self._under_way -= 1
        if isinstance(answer, Exception):
            raise answer
        if answer is not None and not request.cancelled:
            request.new, request.finish_reason = answer["token_ids"], answer["finish_reason"]
            request.tell(self.engine.tokenizer)

    def close(self) -> None:
        """Drop the requests that have not been sent, and wait for the others: their weights must stay till then."""
        self._threads.shutdown(cancel_futures=True)
