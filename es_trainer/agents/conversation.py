"""The turns of one rollout: what the model wrote, and what the tools returned."""

from dataclasses import dataclass, field
from typing import Any

import trl
from packaging.version import Version
from transformers import PreTrainedTokenizerBase

from ..engines.image_prompts import ImageTemplate, following, joined
from ..images import images_of, text_of
from ..rollout import Completion
from .toolbox import ToolResult


TRL_NEEDED = "1.16"  # the first that parses calls by the tools' schemas


class ToolTemplate:
    """
    How a tokenizer or a processor writes tools, their calls and their results.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer. It gets a response schema by which calls are parsed, if it has none.
        images ([`ImageTemplate`], *optional*):
            Has the processor, if the model reads images.
        schemas (`list[dict[str, Any]]`):
            JSON schemas of the tools.
        options (`dict[str, Any]`):
            Further keyword arguments of `apply_chat_template`.

    Raises:
        `ImportError`: If TRL is older than `TRL_NEEDED`.
        `ValueError`: If the chat template cannot write tool calls, or there is no response schema for it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageTemplate | None,
        schemas: list[dict[str, Any]],
        options: dict[str, Any],
    ):
        if Version(trl.__version__) < Version(TRL_NEEDED):
            raise ImportError(f"`tools` need trl>={TRL_NEEDED}, but {trl.__version__} is installed. Install it.")
        from trl.chat_template_utils import (
            add_response_schema,
            get_training_chat_template,
            is_chat_template_prefix_preserving,
            supports_tool_calling,
        )

        writer = tokenizer if images is None else images.processor
        if not supports_tool_calling(writer):
            raise ValueError(
                "`tools` need a chat template that can write a conversation with tool calls (user, assistant with "
                "`tool_calls`, tool), which that of the tokenizer cannot. Set another `tokenizer.chat_template`, or "
                "take a model that was trained to call tools."
            )
        formats = ("response_template", "response_schema")  # of newer and of older versions of Transformers
        if all(getattr(tokenizer, name, None) is None for name in formats):
            add_response_schema(writer)  # to the tokenizer
        self.tokenizer = tokenizer
        self.images = images
        self.schemas = schemas
        self.options = dict(options)
        if not is_chat_template_prefix_preserving(writer):
            # One that writes earlier messages the same way whatever follows
            self.options["chat_template"] = get_training_chat_template(writer)

    def encode(self, prompt: list[dict[str, Any]]) -> list[int]:
        """Tokens of a prompt, with the tools that the model may call; an [`ImagePrompt`] if the model reads images."""
        # Some templates write a text about tools for an empty list, too
        return self._encode(prompt, add_generation_prompt=True, tools=self.schemas or None)

    def encode_results(self, messages: list[dict[str, Any]]) -> list[int]:
        """
        Tokens of tool messages, which follow the message with the calls, and of the beginning of the next answer; an
        [`ImagePrompt`] if the model reads images.

        Raises:
            `ValueError`: If the template writes a call otherwise when its result follows, or a tool has returned an
                image that the model would not see.
        """
        if self.images is None:
            messages = [_without_parts(message) for message in messages]
        # Some templates write the name of the call beside its result
        call = {"type": "function", "function": {"name": messages[0]["name"], "arguments": {}}}
        before = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        prefix = self._encode(before, add_generation_prompt=False)
        whole = self._encode(before + messages, add_generation_prompt=True)
        # An answer ends with its end-of-sequence token; what a template writes behind belongs to the tools' turn
        ends = [i for i, token in enumerate(prefix) if token == self.tokenizer.eos_token_id]
        length = ends[-1] + 1 if ends else len(prefix)
        if whole[:length] != prefix[:length]:
            raise ValueError(
                "The chat template writes a tool call in another way when its result follows, so conversations cannot "
                "go on. Set another `tokenizer.chat_template`."
            )
        if self.images is None:
            return whole[length:]
        beginning = prefix.written[0].text
        if ends:
            beginning = beginning[: beginning.rindex(self.tokenizer.eos_token)] + self.tokenizer.eos_token
        return following(whole, beginning, length)

    def _encode(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        if self.images is not None:
            options = {"tools": tools, **self.options, "add_generation_prompt": add_generation_prompt}
            return self.images.write(messages, {}, **options)
        return self.tokenizer.apply_chat_template(
            messages,
            **{"tools": tools, **self.options},
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
        )

    def parse(self, ids: list[int], prefix: list[int]) -> dict[str, Any]:
        """The message that the model wrote, with its `tool_calls` if it calls tools."""
        from trl.chat_template_utils import parse_response

        return parse_response(self.tokenizer, ids, prefix=prefix, tools=self.schemas)


def _without_parts(message: dict[str, Any]) -> dict[str, Any]:
    """
    A tool's message with a text as its content.

    Raises:
        `ValueError`: If it has an image.
    """
    if images_of([message]):
        raise ValueError(
            f"The tool `{message['name']}` returned an image, but `processing_class` is a tokenizer, so the model "
            "would not see it. Give a model that reads images and its processor, or return texts."
        )
    return {**message, "content": text_of(message["content"])}


@dataclass
class Conversation:
    """
    A rollout that goes on as long as the model calls tools.

    Args:
        prompt_ids (`list[int]`):
            Tokens of the prompt.
        template ([`ToolTemplate`]):
            How tools are written.
        most (`int`):
            Most tokens behind the prompt, results of tools included.
        context (`int`, *optional*):
            Most tokens that the model can read.
    """

    prompt_ids: list[int]
    template: ToolTemplate
    most: int
    context: int | None = None
    parts: list[list[int]] = field(default_factory=list)  # behind the prompt: answers and results
    messages: list[dict[str, Any]] = field(default_factory=list)
    calls: list[bool] = field(default_factory=list)  # whether each failed
    _results: int = 0  # tokens of tools
    _truncated: bool = False

    @property
    def all_ids(self) -> list[int]:
        """Tokens that the next answer goes on from; an [`ImagePrompt`] if the prompt or a result has images."""
        return joined([self.prompt_ids, *self.parts])

    @property
    def ids(self) -> list[int]:
        """Tokens behind the prompt."""
        return [token for part in self.parts for token in part]

    @property
    def pending(self) -> list[dict[str, Any]]:
        """Calls of tools in the last message, which can be followed by their results."""
        images = self.template.images
        if images is not None and images.placeholder in self.parts[-1]:
            return []  # what follows would be read with an image too few
        return self.messages[-1].get("tool_calls") or []

    def add_answer(self, answer: Completion) -> None:
        """Go on with what the model wrote, up to the most tokens."""
        room = self.most - len(self.ids)
        ids = answer.ids[:room]
        self._truncated = answer.truncated or len(answer.ids) > room
        self.messages.append(self.template.parse(ids, prefix=self.all_ids))
        self.parts.append(ids)

    def add_results(self, results: list[ToolResult]) -> bool:
        """Go on with what tools returned. Returns whether the model can answer: results without room are dropped."""
        self.calls += [result.failed for result in results]
        messages = [result.message for result in results]
        ids = self.template.encode_results(messages)
        length = len(self.ids) + len(ids)
        if length >= self.most or (self.context is not None and len(self.prompt_ids) + length >= self.context):
            return False
        self.messages += messages
        self.parts.append(ids)
        self._results += len(ids)
        return True

    def completion(self) -> Completion:
        """The rollout as a completion of its prompt."""
        text = self.template.tokenizer.decode(self.ids, skip_special_tokens=True)
        return Completion(self.ids, text, self._truncated, self._results, self.messages, self.calls)
