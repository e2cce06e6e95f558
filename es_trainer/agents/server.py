"""A server on loopback that answers programs with the members of a population."""

import asyncio
import copy
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..engines import Engine
from ..engines.requests import Request, Requests
from .conversation import ToolTemplate
from .programs import Program, Programs
from .session import Session


if TYPE_CHECKING:
    from fastapi import FastAPI
    from transformers import PreTrainedTokenizerBase


class Refused(Exception):
    """A request that is answered with an error of OpenAI's form."""

    def __init__(self, status: int, message: str, code: str):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Reply:
    """
    What a model has answered so far.

    Args:
        text (`str`):
            The text that programs see.
        message (`dict[str, Any]`):
            The message, with its `tool_calls` if the model calls tools.
        finish_reason (`str`, *optional*):
            Why it ended, by OpenAI's names.
        usage (`dict[str, int]`):
            Numbers of tokens.
    """

    text: str
    message: dict[str, Any]
    finish_reason: str | None
    usage: dict[str, int]


def listen(port: int) -> socket.socket:
    """
    Take a port of 127.0.0.1.

    Args:
        port (`int`):
            The port; 0 takes a free one.

    Raises:
        `OSError`: If it is taken.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError as error:
        listening.close()
        raise OSError(
            f"`agent_port={port}` cannot be listened on ({error.strerror}). Choose another, or 0 for a free one."
        ) from error
    return listening


class ModelServer:
    """
    Answers programs with OpenAI's API on 127.0.0.1, while `serve` generates in the thread that calls it.

    Args:
        engine ([`Engine`]):
            Has the tokenizer and the generation parameters of the run.
        sampling (`dict[str, Any]`):
            Temperature, top-k, top-p and min-p where a request says nothing else.
    """

    base_url: str

    def __init__(self, engine: Engine, sampling: dict[str, Any]):
        self.engine = engine
        self.sampling = sampling
        # Tokenizers change their settings while they encode, and the thread that generates decodes at the same time
        self._tokenizer: PreTrainedTokenizerBase = copy.deepcopy(engine.tokenizer)
        self._templates: dict[str, ToolTemplate] = {}
        self._sessions: dict[str, Session] = {}

    def start(self, app: "FastAPI", listening: socket.socket) -> None:
        """
        Answer requests.

        Args:
            app (`FastAPI`):
                Routes of the API.
            listening (`socket.socket`):
                What [`listen`] returned.
        """
        import uvicorn

        self.base_url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(
            target=self._uvicorn.run, args=([listening],), name="es_trainer-model-server", daemon=True
        )
        thread.start()
        while not self._uvicorn.started and thread.is_alive():
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop listening, as soon as the thread that listens sees it."""
        self._uvicorn.should_exit = True

    # ---- the thread that generates ----

    def serve(
        self, requests: Requests, programs: Programs, sessions: list[Session], report: Callable[[int], None]
    ) -> None:
        """
        Answer programs until all have ended, or one has failed. Several threads may do so at the same time.

        Args:
            requests ([`Requests`]):
                Generates.
            programs ([`Programs`]):
                The programs, which are started as others end.
            sessions (`list[Session]`):
                Their sessions.
            report (`Callable`):
                Told how many programs have not ended yet, as they do.

        Raises:
            `Exception`: Whatever generating raises. Programs are told of it.
        """
        inbox: queue.SimpleQueue[Request | Program] = queue.SimpleQueue()
        programs.ended = inbox.put
        for session in sessions:
            session.ask = inbox.put
            self._sessions[session.key] = session
        try:
            programs.start()
            while len(programs):
                self._receive(inbox, requests, programs)
                self._stop_overdue(programs)
                programs.start()
                report(len(programs))
                if len(requests):
                    requests.step()
        except BaseException as error:
            for session in sessions:
                self._close(session, f"The trainer failed: {type(error).__name__}: {error}")
            raise
        finally:
            for session in sessions:
                self._close(session, "The program's rollout is over.")

    def _receive(self, inbox: "queue.SimpleQueue[Request | Program]", requests: Requests, programs: Programs) -> None:
        """Take requests, and note programs that have ended. Waits where there is nothing to generate."""
        wait = not len(requests)
        while True:
            try:
                item = inbox.get(wait, programs.patience()) if wait else inbox.get_nowait()
            except queue.Empty:
                return
            wait = False
            if isinstance(item, Request):
                requests.add(item)
            else:
                programs.finish(item)

    def _stop_overdue(self, programs: Programs) -> None:
        for program in programs.overdue():
            session = program.endpoint._session
            self._close(session, f"The program took longer than `agent_timeout={programs.timeout}` seconds.")
            program.stop()
            programs.finish(program)

    def _close(self, session: Session, reason: str) -> None:
        if session.closed is None:
            session.close(reason)
        for request in list(session.requests):
            request.cancelled = True
            request.told(request)

    def forget(self, sessions: list[Session]) -> None:
        """Know the keys of sessions no longer, whose programs have ended."""
        for session in sessions:
            self._sessions.pop(session.key, None)

    # ---- the thread that listens ----

    def session_of(self, key: str) -> Session:
        """
        The session that a key belongs to.

        Raises:
            [`Refused`]: If there is none, or it was closed.
        """
        known = next((own for own in list(self._sessions) if secrets.compare_digest(own.encode(), key.encode())), None)
        session = self._sessions.get(known)
        if session is None:
            raise Refused(
                401, "The API key is not that of a program that runs: use `endpoint.api_key`.", "invalid_api_key"
            )
        if session.closed is not None:
            raise Refused(403, session.closed, "session_closed")
        return session

    async def chat(
        self, session: Session, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, **options: Any
    ) -> AsyncIterator[Reply]:
        """Answer a conversation; see [`complete`](ModelServer.complete)."""
        rendered = [_plain(message) for message in messages]
        template = self._template(tools) if tools else None
        try:
            if template is not None:
                ids = template.encode(rendered)
            else:
                ids = self._tokenizer.apply_chat_template(
                    rendered,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=False,
                    **self.engine.chat_template_kwargs,
                )
        except Exception as error:  # whatever a template raises of messages that it cannot write
            raise Refused(400, f"The chat template cannot write the messages: {error}", "invalid_request") from error
        self._check_ids(ids)
        async for reply in self.complete(session, ids, messages, template, **options):
            yield reply

    async def text(self, session: Session, prompt: str | list[int], **options: Any) -> AsyncIterator[Reply]:
        """Go on with a text or tokens; see [`complete`](ModelServer.complete)."""
        ids = self._tokenizer(text=prompt)["input_ids"] if isinstance(prompt, str) else prompt
        self._check_ids(ids)
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
        async for reply in self.complete(session, ids, [{"role": "user", "content": text}], None, **options):
            yield reply

    async def complete(
        self,
        session: Session,
        ids: list[int],
        messages: list[dict[str, Any]],
        template: ToolTemplate | None,
        max_tokens: int | None,
        temperature: float | None,
        top_p: float | None,
        seed: int | None,
        stop: list[str],
        stream: bool,
    ) -> AsyncIterator[Reply]:
        """
        Complete tokens.

        Args:
            session ([`Session`]):
                Whose model it is.
            ids (`list[int]`):
                The tokens.
            messages (`list[dict[str, Any]]`):
                What they say, for the record of the calls.
            template ([`ToolTemplate`], *optional*):
                Parses calls of tools.
            max_tokens, temperature, top_p, seed, stop:
                As in OpenAI's API. What is `None` is that of the run.
            stream (`bool`):
                Whether the answer is wanted as it grows, where nothing has to be known of its end.

        Yields:
            [`Reply`]: what there is of the answer, and in the end all of it.

        Raises:
            [`Refused`]: If the tokens do not fit, or the session is closed meanwhile.
        """
        loop, updates, started = asyncio.get_running_loop(), asyncio.Event(), time.perf_counter()
        sampling = dict(self.sampling)
        sampling |= {
            key: value for key, value in (("temperature", temperature), ("top_p", top_p)) if value is not None
        }
        own_seed = session.next_seed()
        request = Request(
            ids,
            session.member,
            self._room(len(ids), max_tokens),
            sampling,
            own_seed if seed is None else seed,
            stop,
            told=lambda _: loop.call_soon_threadsafe(updates.set),
            every_token=stream and template is None and not stop,
            cache=session.cache,
        )
        session.requests.add(request)
        try:
            if session.closed is not None:  # meanwhile: nobody would answer
                raise Refused(403, session.closed, "session_closed")
            session.ask(request)
            while request.finish_reason is None:
                await updates.wait()
                updates.clear()
                if request.cancelled:
                    raise Refused(403, session.closed or "The request was cancelled.", "session_closed")
                if request.finish_reason is None:
                    yield self._reply(request, request.text.rstrip("\ufffd"))  # half a character
            session.cache = request.cache
            reply = self._last_reply(request, template)
            session.completion_ids.append(request.new)
            session.calls.append(
                {
                    "messages": messages,
                    "reply": reply.message,
                    "finish_reason": reply.finish_reason,
                    "usage": reply.usage,
                    "seconds": time.perf_counter() - started,
                }
            )
            yield reply
        finally:
            request.cancelled = request.finish_reason is None  # who asked has gone
            session.requests.discard(request)

    def _check_ids(self, ids: list[int]) -> None:
        unknown = [token for token in ids if not 0 <= token < self.engine.embedding_rows]
        if unknown:
            raise Refused(400, f"The model has no embedding for the token {unknown[0]}.", "invalid_request")

    def _room(self, length: int, wanted: int | None) -> int:
        """How many tokens an answer may have."""
        context = self.engine.context
        if length == 0:
            raise Refused(400, "The prompt is empty: the model needs a token to go on from.", "invalid_request")
        left = None if context is None else context - length
        if left is not None and left < (wanted or 1):
            raise Refused(
                400,
                f"The prompt has {length} tokens and the answer up to {wanted or 1}, but the model reads at most "
                f"{context}.",
                "context_length_exceeded",
            )
        if wanted is not None:
            return wanted
        return self.engine.max_new_tokens if left is None else min(left, self.engine.max_new_tokens)

    def _template(self, tools: list[dict[str, Any]]) -> ToolTemplate:
        key = json.dumps(tools, sort_keys=True)
        if key not in self._templates:
            try:
                self._templates[key] = ToolTemplate(self._tokenizer, None, tools, self.engine.chat_template_kwargs)
            except (ValueError, ImportError) as error:
                raise Refused(400, str(error), "invalid_request") from error
        return self._templates[key]

    def _reply(self, request: Request, text: str) -> Reply:
        usage = {
            "prompt_tokens": len(request.ids),
            "completion_tokens": len(request.new),
            "total_tokens": len(request.ids) + len(request.new),
        }
        return Reply(text, {"role": "assistant", "content": text}, request.finish_reason, usage)

    def _last_reply(self, request: Request, template: ToolTemplate | None) -> Reply:
        reply = self._reply(request, request.text)
        if template is None:
            return reply
        message = template.parse(request.new, prefix=request.ids)
        calls = message.get("tool_calls") or []
        if not calls:
            return reply
        converted = [
            {
                "id": f"call_{secrets.token_hex(8)}",
                "type": "function",
                "function": {"name": call["function"]["name"], "arguments": json.dumps(call["function"]["arguments"])},
            }
            for call in calls
        ]
        content = message.get("content") or None
        whole = {"role": "assistant", "content": content, "tool_calls": converted}
        return Reply(content or "", whole, "tool_calls", reply.usage)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message of OpenAI's API as chat templates know it: content that is a text, arguments that are a dict."""
    message = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        others = [part.get("type") for part in content if part.get("type") != "text"]
        if others:
            raise Refused(
                400, f"A message has a part of the type {others[0]!r}: only texts are read.", "invalid_request"
            )
        message["content"] = "".join(part["text"] for part in content)
    elif content is None:
        message["content"] = ""
    if message.get("tool_calls"):
        message["tool_calls"] = [_plain_call(call) for call in message["tool_calls"]]
    return message


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except json.JSONDecodeError as error:
            raise Refused(400, f"The arguments of a tool call are no JSON: {error}", "invalid_request") from error
    return {**call, "function": function}
