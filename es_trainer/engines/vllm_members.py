"""What `es-trainer vllm-serve` adds to vLLM's API server: completions by a member, in one request."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from .vllm_sampling import sampling_params


if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

Message = MutableMapping[str, Any]
Perturbation = tuple[int, int, float]  # seed and sign of a member, and sigma

COMPLETIONS = "/member_completions"
WORKERS_METHODS = "/collective_rpc"  # vLLM's own, by which a run begins and weights are updated


class WeightsInUse:
    """
    Whose weights the engine has. Requests for the same weights share them, and wait until those for others have ended.

    Args:
        write (`Callable`):
            Makes the weights those of a member, or the unperturbed ones if it is given `None`. Returns the response of
            each worker.
    """

    def __init__(self, write: Callable[[Perturbation | None], Awaitable[list[dict[str, Any]]]]):
        self._write = write
        self._changed = asyncio.Condition()
        self._requests = 0  # that use the weights
        self._known = False  # whether the weights are those of `_member`
        self._member: Perturbation | None = None
        self._step = ""

    @contextlib.asynccontextmanager
    async def of(self, member: Perturbation | None) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
        """
        Inside, the weights are those of a member. Yields their salt in the prefix cache, and the responses of workers
        that had to write them: with an error, the weights are not there.
        """
        responses: list[dict[str, Any]] = []
        async with self._changed:
            await self._changed.wait_for(lambda: not self._requests or self._is(member))
            if not self._is(member):
                self._known = False
                responses = await self._write(member)
                self._known, self._member = not any("error" in response for response in responses), member
            self._requests += 1
        try:
            yield f"{self._step}/{member}", responses
        finally:
            await self._leave()

    @contextlib.asynccontextmanager
    async def changed(self) -> AsyncIterator[None]:
        """Inside, the weights can be changed, as in a step: no request uses them, and those that follow know nothing
        of what they were."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._requests)
            self._known, self._step = False, uuid.uuid4().hex
            yield

    def _is(self, member: Perturbation | None) -> bool:
        return self._known and self._member == member

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
        member: list[Any] | None,
        prompts: list[list[int]],
        options: dict[str, Any],
        seeds: list[int | None],
    ) -> dict[str, Any]:
        """
        Complete prompts.

        Args:
            member (`list`, *optional*):
                Seed, sign and sigma of a member. `None` for the unperturbed weights.
            prompts (`list[list[int]]`):
                Tokens of the prompts.
            options (`dict[str, Any]`):
                Sampling parameters, by vLLM's names.
            seeds (`list[int | None]`):
                Seed of each completion; `None` if decoding is greedy.

        Returns:
            `dict`: Under `"completed"`, the `"written"` responses of the workers that wrote the weights, the
            `"noise_seconds"` that this took, and the `"choices"`: the `"token_ids"` and `"finish_reason"` of each
            completion.
        """
        start = time.perf_counter()
        async with self._weights.of(None if member is None else tuple(member)) as (salt, written):
            noise_seconds = time.perf_counter() - start if written else 0.0
            choices = []
            if not any("error" in response for response in written):
                choices = await _together(
                    [
                        self._complete({"prompt_token_ids": prompt, "cache_salt": salt}, options, seed)
                        for prompt, seed in zip(prompts, seeds, strict=True)
                    ]
                )
        return {"completed": {"written": written, "noise_seconds": noise_seconds, "choices": choices}}

    async def _write(self, member: Perturbation | None) -> list[dict[str, Any]]:
        if member is None:
            return await self._engine.collective_rpc("restore")
        return await self._engine.collective_rpc("perturb", args=member)

    async def _complete(self, prompt: dict[str, Any], options: dict[str, Any], seed: int | None) -> dict[str, Any]:
        from vllm.sampling_params import RequestOutputKind

        params = sampling_params(options, seed)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        self._completed += 1
        async for output in self._engine.generate(prompt, params, f"member-completion-{self._completed}"):
            made = output.outputs[0]
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
