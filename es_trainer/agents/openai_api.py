"""OpenAI's API on a model server, as FastAPI routes."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from .server import ModelServer, Refused, Reply
from .session import Session


# What would change an answer and has no meaning here, with the values that ask for nothing
WITHOUT_MEANING: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
}


class CommonBody(BaseModel):
    """What requests for completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of [`ModelServer.complete`]."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": stop,
            "stream": bool(self.stream),
        }


class ChatBody(CommonBody):
    """A request to `/v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


class TextBody(CommonBody):
    """A request to `/v1/completions`."""

    prompt: str | list[str] | list[int]


def make_app(server: ModelServer) -> FastAPI:
    """
    Args:
        server ([`ModelServer`]):
            Answers the requests.
    """
    app = FastAPI(title="es_trainer", openapi_url=None)

    @app.exception_handler(Refused)
    async def refused(request: HTTPRequest, error: Refused) -> JSONResponse:
        return _error(error.status, error.message, error.code)

    @app.exception_handler(HTTPException)
    async def http_error(request: HTTPRequest, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), None)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: HTTPRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return _error(400, f"`{where}`: {first['msg']}", "invalid_request")

    async def session_of(request: HTTPRequest) -> Session:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return server.session_of(key if scheme.lower() == "bearer" else "")

    own_session = Annotated[Session, Depends(session_of)]

    @app.get("/v1/models")
    async def models(session: own_session) -> dict[str, Any]:
        own = {"id": session.model, "object": "model", "created": 0, "owned_by": "es_trainer"}
        return {"object": "list", "data": [own]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, session: own_session) -> JSONResponse | StreamingResponse:
        _check(body, session)
        replies = server.chat(session, body.messages, _tools(body), **body.options)
        return await _respond(body, session, replies, "chat.completion")

    @app.post("/v1/completions", response_model=None)
    async def completions(body: TextBody, session: own_session) -> JSONResponse | StreamingResponse:
        _check(body, session)
        prompt = body.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise Refused(400, "`prompt` has several texts: ask for one at a time.", "invalid_request")
            prompt = prompt[0]
        replies = server.text(session, prompt, **body.options)
        return await _respond(body, session, replies, "text_completion")

    return app


def _error(status: int, message: str, code: str | None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


def _check(body: CommonBody, session: Session) -> None:
    if body.model != session.model:
        raise Refused(
            404,
            f"This program's model is {session.model!r}, not {body.model!r}: use `endpoint.model`.",
            "model_not_found",
        )
    if "" in body.options["stop"]:
        raise Refused(400, "`stop` has an empty text: leave it out.", "invalid_request")
    for name, value in (body.model_extra or {}).items():
        if name in WITHOUT_MEANING and value not in WITHOUT_MEANING[name]:
            raise Refused(400, f"`{name}={value!r}` is not supported: leave it out.", "unsupported_parameter")


def _tools(body: ChatBody) -> list[dict[str, Any]] | None:
    """The tools that the model is shown. That it calls one is its own choice, whatever `tool_choice` requires."""
    choice = body.tool_choice
    if not body.tools or choice == "none":
        return None
    if isinstance(choice, dict):
        name = choice.get("function", {}).get("name")
        chosen = [tool for tool in body.tools if tool.get("function", {}).get("name") == name]
        if not chosen:
            raise Refused(400, f"`tool_choice` names {name!r}, which `tools` do not have.", "invalid_request")
        return chosen
    return body.tools


async def _respond(
    body: CommonBody, session: Session, replies: AsyncIterator[Reply], kind: str
) -> JSONResponse | StreamingResponse:
    """The last of the replies, or all of them as server-sent events."""
    form = _Form(session.model, kind)
    if not body.stream:
        async for reply in replies:
            last = reply
        return JSONResponse(form.whole(last))
    first = await anext(replies)  # errors of the request come before the first event
    usage = bool((body.stream_options or {}).get("include_usage"))

    async def events() -> AsyncIterator[str]:
        sent = ""
        try:
            reply: Reply | None = first
            while reply is not None:
                for chunk in form.chunks(reply, sent, usage):
                    yield f"data: {json.dumps(chunk)}\n\n"
                sent = reply.text
                reply = None if reply.finish_reason else await anext(replies, None)
            yield "data: [DONE]\n\n"
        except Refused as error:
            yield f"data: {_error(error.status, error.message, error.code).body.decode()}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


class _Form:
    """Replies in the form of chat completions or of text completions."""

    def __init__(self, model: str, kind: str):
        self.chat = kind == "chat.completion"
        number = uuid.uuid4().hex
        self.common = {
            "id": f"chatcmpl-{number}" if self.chat else f"cmpl-{number}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, reply: Reply) -> dict[str, Any]:
        content = {"message": reply.message} if self.chat else {"text": reply.text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reply.finish_reason}
        return {**self.common, "choices": [choice], "usage": reply.usage}

    def chunks(self, reply: Reply, sent: str, usage: bool) -> list[dict[str, Any]]:
        """What is new in a reply, after what was sent."""
        common = {**self.common, "object": "chat.completion.chunk"} if self.chat else self.common
        new = reply.text[len(sent) :]
        content: dict[str, Any] = {"text": new}
        if self.chat:
            delta: dict[str, Any] = {} if sent else {"role": "assistant"}
            if new:
                delta["content"] = new
            if reply.finish_reason and reply.message.get("tool_calls"):
                delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(reply.message["tool_calls"])]
            content = {"delta": delta}
        chunks = []
        if new or reply.finish_reason or not sent:
            choice = {"index": 0, **content, "logprobs": None, "finish_reason": reply.finish_reason}
            chunks.append({**common, "choices": [choice]})
        if usage and reply.finish_reason:
            chunks.append({**common, "choices": [], "usage": reply.usage})
        return chunks
