"""One vLLM server as an engine, by whichever members it has."""

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import ESConfig
from ..evolution import Member
from ..rollout import Completion
from .base import Engine
from .decoding import Row
from .requests import Request
from .vllm_client import VLLMClient
from .vllm_members import WeightsOf
from .vllm_sampling import common_seed, request_options, sampling_options


PATIENCE = 0.01  # seconds that a step waits for an answer
MOST_CONNECTIONS = 256


class VLLMServerEngine(Engine):
    """
    Generates on one server, by the members and of the prompts that it was given last.

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
    """

    reads_images = True
    members: Sequence[Member] = ()  # none: the unperturbed weights
    sigma = 0.0
    prompts = range(0)

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: ESConfig,
        server: VLLMClient,
        context: int,
    ):
        super().__init__(model, tokenizer, args)
        self.server = server
        self.context = context
        self.sampling = sampling_options(args, self.eos_token_ids)
        self.max_new_tokens = self.sampling["max_tokens"]

    def give(self, members: Sequence[Member], sigma: float, prompts: range) -> None:
        """
        Say who answers next, and what.

        Args:
            members (`Sequence[Member]`):
                The members. Without any, the unperturbed weights answer.
            sigma (`float`):
                Standard deviation of the noise.
            prompts (`range`):
                Numbers of the prompts.
        """
        self.members, self.sigma, self.prompts = members, sigma, prompts

    def prompt_shard(self, num_prompts: int) -> range:
        """Numbers of the prompts that this server completes."""
        return self.prompts

    def answers(
        self, prompts: list[list[int]], options: dict[str, Any], seeds: list[int | None], members: list[int]
    ) -> list[dict[str, Any]]:
        """What the server completes prompts with, each by one of the members; see [`VLLMClient.complete`]."""
        return self.server.complete(self._weights(), prompts, options, seeds, self._slots(members))

    def _weights(self) -> WeightsOf:
        """What the server has to write."""
        for member in self.members:  # there is one at most
            if not member.is_center:
                return "perturb", (member.seed, member.sign, self.sigma)
        return "restore", ()

    def _slots(self, members: list[int]) -> list[int | None]:
        """The adapter slots of members, by their numbers among those that answer."""
        return [None] * len(members)

    def complete(
        self,
        ids: list[list[int]],
        rows: list[Row],
        seed: int,
        members: None = None,
        batch_size: int | None = None,
        progress: bool = False,
        caches: dict[str, Any] | None = None,
    ) -> list[Completion]:
        """
        Complete rows that have a text of their own each; see [`TransformersEngine.complete`]. vLLM keeps the caches.
        """
        samples = self.sampling["temperature"] > 0
        seeds = [common_seed(seed, row.prompt, row.number) if samples else None for row in rows]
        choices = self.answers(ids, self.sampling, seeds, [row.member for row in rows])
        return [self._completion(choice["token_ids"], choice["finish_reason"] == "length") for choice in choices]

    def requests(self, members: None = None, most_rows: int | None = None) -> "ServerRequests":
        """
        Requests that are answered as they come; see [`TransformersEngine.requests`].

        Args:
            most_rows (`int`, *optional*):
                Most requests that are sent at once.
        """
        return ServerRequests(self, most_rows or MOST_CONNECTIONS)


class ServerRequests:
    """
    Sends each request to a server, which batches them. Texts are known in the end only.

    Args:
        engine ([`VLLMServerEngine`]):
            The server.
        most (`int`):
            Most requests that are sent at once.
    """

    def __init__(self, engine: VLLMServerEngine, most: int):
        self.engine = engine
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
                options, seed = request_options(self.engine.sampling, request)
                (answer,) = self.engine.answers([request.ids], options, [seed], [request.member])
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
