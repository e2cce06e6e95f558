"""One vLLM server as the trainer sees it: an HTTP client for completions and for the methods of its workers."""

import base64
import contextlib
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import torch

from ..weights.part import Part
from .live_weights import PROBE_SAMPLING


EXPORTED_WEIGHTS = 1 << 22  # in one response
CONNECT_SECONDS = 5.0  # that a server may take to accept a connection


class ServerError(RuntimeError):
    """A vLLM server has refused something, or none is left."""


class ServerLost(ServerError):
    """A vLLM server does not answer, or has started anew."""


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
        token = os.environ.get("VLLM_API_KEY")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout)),
            limits=httpx.Limits(max_connections=None),
        )

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
        responses = self._send("POST", "/collective_rpc", {"method": method, "args": args}, key="results")
        for response in responses:
            if "error" in response:
                kind = ServerLost if response["error"].startswith("NotBegun") else ServerError
                raise kind(f"The vLLM server {self.url} failed to {method}: {response['error']}")
        return responses

    def model_info(self) -> dict[str, Any]:
        """vLLM's description of the model that it serves."""
        return self._send("GET", "/v1/models", key="data")[0]

    def complete(
        self, prompts: list[list[int]], options: dict[str, Any], seeds: list[int | None], salt: str | None = None
    ) -> list[dict[str, Any]]:
        """
        Complete prompts. Prompts with a seed are sent one by one, as a request has one seed.

        The weights have to stay the same until this returns. A salt in vLLM's prefix cache keeps calls with other
        weights from reading its keys and values, even if this call failed.

        Args:
            prompts (`list[list[int]]`):
                Tokens of the prompts.
            options (`dict[str, Any]`):
                What `sampling_options` returned.
            seeds (`list[int | None]`):
                Seed of each completion, or `None` for all of them if decoding is greedy.
            salt (`str`, *optional*):
                The salt, which calls with the same weights may share. If `None`, one that no other call has.

        Returns:
            `list[dict[str, Any]]`: The `"token_ids"` and `"finish_reason"` of each completion.
        """
        options = {**options, "cache_salt": salt or uuid.uuid4().hex}
        if seeds[0] is None:
            return self._complete(prompts, options)
        with ThreadPoolExecutor(len(prompts)) as requests:
            responses = requests.map(
                lambda prompt, seed: self._complete([prompt], {**options, "seed": seed}), prompts, seeds
            )
            return [choice for (choice,) in responses]

    def load_adapter(self, name: str, path: str) -> None:
        """Have the server know an adapter by a name, which `"model"` of requests may be then."""
        self._reply("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def models(self) -> list[str]:
        """Names of the model that it serves, and of its adapters."""
        return [model["id"] for model in self._send("GET", "/v1/models", key="data")]

    def logprobs(self, prompt: list[int], tokens: int, salt: str, adapter: str | None = None) -> list[float]:
        """The highest log probabilities of tokens after a prompt, with a salt in vLLM's prefix cache."""
        # Tokens by their ids, as several tokens may have the same text
        options = {**PROBE_SAMPLING, "max_tokens": tokens, "cache_salt": salt, "return_tokens_as_token_ids": True}
        (choice,) = self._complete([prompt], options if adapter is None else {**options, "model": adapter})
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

    def _complete(self, prompts: list[list[int]], options: dict[str, Any]) -> list[dict[str, Any]]:
        request = {"prompt": prompts, "return_token_ids": True, **options}
        choices = self._send("POST", "/v1/completions", request, key="choices")
        if len(choices) != len(prompts):
            raise ServerError(
                f"The vLLM server {self.url} gave {len(choices)} completions for {len(prompts)} prompts."
            )
        if any(choice["finish_reason"] == "abort" for choice in choices):
            raise ServerLost(f"The vLLM server {self.url} broke off a completion: it is paused or ends.")
        return sorted(choices, key=lambda choice: choice["index"])

    def _send(self, verb: str, path: str, content: dict[str, Any] | None = None, *, key: str) -> Any:
        """Return the value under `key` of the server's response."""
        reply = self._reply(verb, path, content)
        try:
            return reply.json()[key]
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError(
                f"The vLLM server {self.url} answered {path} without {key!r}: {reply.text[:500]!r}. Something else "
                "than `es-trainer vllm-serve` listens there, or a proxy has answered."
            ) from error

    def _reply(self, verb: str, path: str, content: dict[str, Any] | None) -> httpx.Response:
        """Send a request. Requests are not retried: most change the server."""
        try:
            reply = self._http.request(verb, path, json=content)
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
