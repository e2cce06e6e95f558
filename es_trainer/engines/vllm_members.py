"""What `es-trainer vllm-serve` adds to vLLM's API server: completions by a member, in one request."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from .vllm_prompts import check_tokens, from_json
from .vllm_sampling import sampling_params
from .vllm_slots import slot_request


if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

Message = MutableMapping[str, Any]
WeightsOf = tuple[str, tuple[Any, ...]]  # a method of the workers that writes members, and its arguments

COMPLETIONS = "/member_completions"
WORKERS_METHODS = "/collective_rpc"  # vLLM's own, by which a run begins and weights are updated


class WeightsInUse:
    """
    Whose weights the engine has. Requests for the same weights share them, and wait until those for others have ended.

    Args:
        write (`Callable`):
            Makes the weights those that a method of the workers writes. Returns the response of each worker.
    """

    def __init__(self, write: Callable[[WeightsOf], Awaitable[list[dict[str, Any]]]]):
        self._write = write
        self._changed = asyncio.Condition()
        self._requests = 0  # that use the weights
        self._known: WeightsOf | None = None  # what they are, if that is known
        self._step = ""

    @contextlib.asynccontextmanager
    async def of(self, weights: WeightsOf) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
        """
        Inside, the weights are those that are asked for. Yields their salt in the prefix cache, and the responses of
        workers that had to write them: with an error, the weights are not there.
        """
        responses: list[dict[str, Any]] = []
        async with self._changed:
            await self._changed.wait_for(lambda: not self._requests or self._known == weights)
            if self._known != weights:
                self._known = None
                responses = await self._write(weights)
                if not any("error" in response for response in responses):
                    self._known = weights
            self._requests += 1
        try:
            yield f"{self._step}/{weights}", responses
        finally:
            await self._leave()

    @contextlib.asynccontextmanager
    async def changed(self) -> AsyncIterator[None]:
        """Inside, the weights can be changed, as in a step: no request uses them, and those that follow know nothing
        of what they were."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._requests)
            self._known, self._step = None, uuid.uuid4().hex
            yield

    async def _leave(self) -> None:
        async with self._changed:
            self._requests -= 1
            self._changed.notify_all()


class Members:
    """
    ASGI middleware with one more path: completions of prompts by a member, or by the unperturbed weights. The weights
    are written if they are not there already. If the client goes away, the completions are aborted.

    Args:
        app (`Callable`):
            vLLM's API server.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app
        self._engine: EngineClient | None = None
        self._weights = WeightsInUse(self._write)
        self._completed = 0  # completions, whose numbers are their names

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        path = scope.get("path")
        if path == WORKERS_METHODS:
            async with self._weights.changed():
                await self.app(scope, receive, send)
        elif path == COMPLETIONS:
            self._engine = scope["app"].state.engine_client
            await self._respond(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _respond(self, scope: Message, receive: Callable, send: Callable) -> None:
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        request = await Request(scope, receive).json()
        answer = asyncio.ensure_future(self._answer(**request))
        gone = asyncio.ensure_future(_disconnected(receive))
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not answer.done():
            answer.cancel()
            await asyncio.wait({answer})
            return
        try:
            response = JSONResponse(answer.result())
        except (ValueError, TypeError) as error:
            response = JSONResponse({"error": f"{type(error).__name__}: {error}"}, status_code=400)
        await response(scope, receive, send)

    async def _answer(
        self,
        weights: list[Any],
        prompts: list[list[int] | dict[str, Any]],
        options: dict[str, Any],
        seeds: list[int | None],
        slots: list[int | None],
    ) -> dict[str, Any]:
        """
        Complete prompts.

        Args:
            weights (`list`):
                The method of the workers that writes the members, and its arguments.
            prompts (`list[list[int] | dict[str, Any]]`):
                Tokens of the prompts; of one with images, what `as_json` returned.
            options (`dict[str, Any]`):
                Sampling parameters, by vLLM's names.
            seeds (`list[int | None]`):
                Seed of each completion; `None` if decoding is greedy.
            slots (`list[int | None]`):
                The adapter slot of each prompt's member; `None` for the engine's weights.

        Returns:
            `dict`: Under `"completed"`, the `"written"` responses of the workers that wrote the weights, the
            `"noise_seconds"` that this took, and the `"choices"`: the `"token_ids"` and `"finish_reason"` of each
            completion.
        """
        start = time.perf_counter()
        async with self._weights.of((weights[0], tuple(weights[1]))) as (salt, written):
            noise_seconds = time.perf_counter() - start if written else 0.0
            choices = []
            if not any("error" in response for response in written):
                choices = await _together(
                    [
                        self._complete(*from_json(prompt, salt), options, seed, slot)
                        for prompt, seed, slot in zip(prompts, seeds, slots, strict=True)
                    ]
                )
        return {"completed": {"written": written, "noise_seconds": noise_seconds, "choices": choices}}

    async def _write(self, weights: WeightsOf) -> list[dict[str, Any]]:
        method, arguments = weights
        return await self._engine.collective_rpc(method, args=arguments)

    async def _complete(
        self,
        ids: list[int],
        prompt: dict[str, Any],
        options: dict[str, Any],
        seed: int | None,
        slot: int | None,
    ) -> dict[str, Any]:
        from vllm.sampling_params import RequestOutputKind

        params = sampling_params(options, seed)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        self._completed += 1
        name = f"member-completion-{self._completed}"
        adapter = None if slot is None else slot_request(slot)
        async for output in self._engine.generate(prompt, params, name, lora_request=adapter):
            made = output.outputs[0]
        check_tokens(ids, output.prompt_token_ids)
        return {"token_ids": list(made.token_ids), "finish_reason": made.finish_reason}


async def _together(completions: list[Awaitable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """All completions; if one fails, the others end before its error is raised, so that none uses the weights."""
    tasks = [asyncio.ensure_future(completion) for completion in completions]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
