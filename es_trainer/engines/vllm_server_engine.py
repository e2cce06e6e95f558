"""One vLLM server as an engine, while it has the weights of a member or the unperturbed ones."""

import queue
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
from .vllm_sampling import common_seed, request_options, sampling_options


PATIENCE = 0.01  # seconds that a step waits for an answer
MOST_CONNECTIONS = 256


class VLLMServerEngine(Engine):
    """
    Generates on one server, by the member and of the prompts that it was given last.

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

    member: Member | None = None  # `None` has the unperturbed weights
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

    def give(self, member: Member | None, sigma: float, prompts: range) -> None:
        """
        Say who answers next, and what.

        Args:
            member ([`Member`], *optional*):
                The member. `None` for the unperturbed weights.
            sigma (`float`):
                Standard deviation of the noise.
            prompts (`range`):
                Numbers of the prompts.
        """
        self.member, self.sigma, self.prompts = member, sigma, prompts

    def prompt_shard(self, num_prompts: int) -> range:
        """Numbers of the prompts that this server completes."""
        return self.prompts

    def answers(
        self, prompts: list[list[int]], options: dict[str, Any], seeds: list[int | None]
    ) -> list[dict[str, Any]]:
        """What the server completes prompts with; see [`VLLMClient.complete`]."""
        return self.server.complete(self.member, self.sigma, prompts, options, seeds)

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
        choices = self.answers(ids, self.sampling, seeds)
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
                (answer,) = self.engine.answers([request.ids], options, [seed])
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
