"""One vLLM server as the trainer sees it: an HTTP client for completions and for the methods of its workers."""

import asyncio
import base64
import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import httpx
import torch

from ..event_loop import event_loop
from ..weights.part import Part
from .live_weights import PROBE_SAMPLING
from .vllm_members import COMPLETIONS, WORKERS_METHODS, WeightsOf
from .vllm_prompts import as_json


EXPORTED_WEIGHTS = 1 << 22  # in one response
CONNECT_SECONDS = 5.0  # that a server may take to accept a connection


class ServerError(RuntimeError):
    """A vLLM server has refused something, or none is left."""


class ServerLost(ServerError):
    """A vLLM server does not answer, or has started anew."""


class Cancelled(ServerError):
    """Completions are not wanted any more."""


class VLLMClient:
    """
    Client of a vLLM server that was started with `es-trainer vllm-serve`.

    Args:
        url (`str`):
            Base URL of the server.
        timeout (`float`):
            Seconds that a response may take.
    """

    def __init__(self, url: str, timeout: float):
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.last_error = "it was never reached"
        self.noise_seconds = 0.0  # that the server took to write weights before completions
        token = os.environ.get("VLLM_API_KEY")
        options: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {token}"} if token else {},
            "timeout": httpx.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout)),
            "limits": httpx.Limits(max_connections=None),
        }
        self._http = httpx.Client(**options)
        self._completing = httpx.AsyncClient(**options)  # whose requests can be cancelled
        self._under_way: set[Future[httpx.Response]] = set()

    def is_up(self) -> bool:
        """Whether the server is healthy; if not, `last_error` says why."""
        try:
            reply = self._http.get("/health", timeout=CONNECT_SECONDS)
        except httpx.RequestError as error:
            self.last_error = f"{type(error).__name__}: {error}"
            return False
        if not reply.is_success:
            self.last_error = f"/health answers {reply.status_code}"
        return reply.is_success

    def call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Call a method of the worker extension; returns the response of each worker."""
        responses = self._send("POST", WORKERS_METHODS, {"method": method, "args": args}, key="results")
        self._check(responses, method)
        return responses

    def _check(self, responses: list[dict[str, Any]], what: str) -> None:
        """Raise the errors that workers have responded with."""
        for response in responses:
            if "error" in response:
                kind = ServerLost if response["error"].startswith("NotBegun") else ServerError
                raise kind(f"The vLLM server {self.url} failed to {what}: {response['error']}")

    def model_info(self) -> dict[str, Any]:
        """vLLM's description of the model that it serves."""
        return self._models()[0]

    def complete(
        self,
        weights: WeightsOf,
        prompts: list[list[int]],
        options: dict[str, Any],
        seeds: list[int | None],
        slots: list[int | None],
    ) -> list[dict[str, Any]]:
        """
        Have members complete prompts, in one request.

        Args:
            weights (`WeightsOf`):
                The method of the workers that writes the members, and its arguments.
            prompts (`list[list[int]]`):
                Tokens of the prompts; those with images are [`ImagePrompt`]s.
            options (`dict[str, Any]`):
                What `sampling_options` returned.
            seeds (`list[int | None]`):
                Seed of each completion; `None` if decoding is greedy.
            slots (`list[int | None]`):
                The adapter slot of each prompt's member; `None` for the engine's weights.

        Returns:
            `list[dict[str, Any]]`: The `"token_ids"` and `"finish_reason"` of each completion.

        Raises:
            [`Cancelled`]: If `cancel` was called.
        """
        content = {
            **{"weights": weights, "prompts": [as_json(prompt) for prompt in prompts]},
            **{"options": options, "seeds": seeds, "slots": slots},
        }
        answer = self._send("POST", COMPLETIONS, content, key="completed", request=self._cancellable)
        self._check(answer["written"], "write the weights of a member")
        self.noise_seconds += answer["noise_seconds"]
        return self._checked(answer["choices"], len(prompts))

    def cancel(self) -> None:
        """Break off the completions that are under way. The server aborts them before it changes its weights."""
        for request in list(self._under_way):
            request.cancel()

    def load_adapter(self, name: str, path: str) -> None:
        """Have the server know an adapter by a name, which `"model"` of requests may be then."""
        self._reply(self._http.request, "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def models(self) -> list[str]:
        """Names of the model that it serves, and of its adapters."""
        return [model["id"] for model in self._models()]

    def _models(self) -> list[dict[str, Any]]:
        return self._send("GET", "/v1/models", key="data")

    def logprobs(self, prompt: list[int], tokens: int, salt: str, adapter: str | None = None) -> list[float]:
        """The highest log probabilities of tokens after a prompt, with a salt in vLLM's prefix cache."""
        # Tokens by their ids, as several tokens may have the same text
        options = {**PROBE_SAMPLING, "max_tokens": tokens, "cache_salt": salt, "return_tokens_as_token_ids": True}
        content = {"prompt": [prompt], **options} | ({} if adapter is None else {"model": adapter})
        (choice,) = self._checked(self._send("POST", "/v1/completions", content, key="choices"), 1)
        return [logprob for token in choice["logprobs"]["top_logprobs"] for logprob in token.values()]

    @contextlib.contextmanager
    def overwritten(self, name: str) -> Iterator[None]:
        """Inside, the parameter has other weights."""
        self.call("overwrite", name)
        try:
            yield
        finally:
            self.call("undo_overwrite")

    def export(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """
        A parameter or buffer as it is saved, put together from what the workers have of it.

        Args:
            name (`str`):
                Name of the parameter or buffer.
            like (`torch.Tensor`):
                A tensor of its shape, on any device.

        Returns:
            `torch.Tensor`: The values, in host memory.
        """
        pieces: list[list[dict[str, Any]]] = []
        low = 0
        while not pieces or low < max(part["size"] for part in pieces[0]):
            pieces.append(self.call("export", name, low, low + EXPORTED_WEIGHTS))
            low += EXPORTED_WEIGHTS
        whole = torch.empty(like.shape, dtype=getattr(torch, pieces[0][0]["dtype"]))
        for parts in zip(*pieces, strict=True):  # of each worker
            data = b"".join(base64.b64decode(part["data"]) for part in parts)
            if parts[0]["replica"] or not data:
                continue
            part = Part(name, like.shape, parts[0]["offset"], parts[0]["length"], parts[0]["period"])
            part.put_into(whole, torch.frombuffer(bytearray(data), dtype=whole.dtype))
        return whole

    def _checked(self, choices: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
        if len(choices) != number:
            raise ServerError(f"The vLLM server {self.url} gave {len(choices)} completions for {number} prompts.")
        if any(choice["finish_reason"] == "abort" for choice in choices):
            raise ServerLost(f"The vLLM server {self.url} broke off a completion: it is paused or ends.")
        return choices

    def _cancellable(self, verb: str, path: str, json: dict[str, Any] | None) -> httpx.Response:
        reply = asyncio.run_coroutine_threadsafe(self._completing.request(verb, path, json=json), event_loop())
        self._under_way.add(reply)
        try:
            return reply.result()
        except CancelledError as error:
            raise Cancelled(f"Completions by the vLLM server {self.url} were cancelled.") from error
        finally:
            self._under_way.discard(reply)

    def _send(
        self,
        verb: str,
        path: str,
        content: dict[str, Any] | None = None,
        *,
        key: str,
        request: Callable[..., httpx.Response] | None = None,
    ) -> Any:
        """Return the value under `key` of the server's response."""
        reply = self._reply(request or self._http.request, verb, path, content)
        try:
            return reply.json()[key]
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError(
                f"The vLLM server {self.url} answered {path} without {key!r}: {reply.text[:500]!r}. Something else "
                "than `es-trainer vllm-serve` listens there, or a proxy has answered."
            ) from error

    def _reply(
        self, request: Callable[..., httpx.Response], verb: str, path: str, content: dict[str, Any] | None
    ) -> httpx.Response:
        """Send a request. Requests are not retried: most change the server."""
        try:
            reply = request(verb, path, json=content)
        except httpx.RequestError as error:
            slow = isinstance(error, httpx.ReadTimeout)
            why = (
                f"no answer within vllm_server_timeout={self.timeout} s"
                if slow
                else f"{type(error).__name__}: {error}"
            )
            raise ServerLost(f"The vLLM server {self.url} is lost: {why}") from error
        if reply.is_server_error:
            raise ServerLost(f"The vLLM server {self.url} failed: {reply.status_code} {reply.text[:500]}")
        if reply.status_code in (401, 403):
            raise ServerError(
                f"The vLLM server {self.url} asks for a token: set the environment variable VLLM_API_KEY to the one "
                "that it was started with."
            )
        if reply.status_code == 404:
            raise ServerError(
                f"The vLLM server {self.url} does not know {path}: start it with `es-trainer vllm-serve`."
            )
        if reply.is_error:
            raise ServerError(f"The vLLM server {self.url} refused {path}: {reply.status_code} {reply.text[:500]}")
        return reply
