"""Requests that vLLM's scheduler answers as they come."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from .requests import Request
from .vllm_sampling import request_options, sampling_params


if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest


class VLLMRequests:
    """
    Answers requests in vLLM's running batch.

    Args:
        llm ([`~vllm.LLM`]):
            The engine.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        options (`dict[str, Any]`):
            Sampling parameters of the run, by vLLM's names.
        adapters (`Sequence[LoRARequest | None]`):
            Those of the members. `None` is for the engine's weights.
        salt (`str`):
            Salt of vLLM's prefix cache, which no other weights have.
    """

    def __init__(
        self,
        llm: "LLM",
        tokenizer: PreTrainedTokenizerBase,
        options: dict[str, Any],
        adapters: "Sequence[LoRARequest | None]",
        salt: str,
    ):
        self.llm = llm
        self.tokenizer = tokenizer
        self.options = options
        self.adapters = adapters
        self.salt = salt
        self._requests: dict[str, Request] = {}
        self._added = 0

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        """Answer a request from the next step on."""
        self._added += 1
        name = f"{self.salt}/{self._added}"
        self._requests[name] = request
        self.llm.llm_engine.add_request(
            name,
            {"prompt_token_ids": request.ids, "cache_salt": self.salt},
            sampling_params(*request_options(self.options, request)),
            lora_request=self.adapters[request.member],
        )

    def step(self) -> None:
        """Generate a token for each request, and tell those who asked."""
        cancelled = [name for name, request in self._requests.items() if request.cancelled]
        if cancelled:
            self.llm.llm_engine.abort_request(cancelled)
            for name in cancelled:
                del self._requests[name]
        for output in self.llm.llm_engine.step():
            request = self._requests.get(output.request_id)
            if request is None:
                continue
            made = output.outputs[0]
            request.new = list(made.token_ids)
            if output.finished:
                request.finish_reason = made.finish_reason
                del self._requests[output.request_id]
            request.tell(self.tokenizer)  # not of vLLM's own text, which leaves out characters that have not ended

    def close(self) -> None:
        """Drop the requests that have not ended."""
        self.llm.llm_engine.abort_request(list(self._requests))
        self._requests.clear()
