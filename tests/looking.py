"""A tool that returns images, and tiny models that call it after every answer."""

import pytest
from tiny_vision import Tiny, make_tiny, picture

from es_trainer.agents import ToolTemplate


MOST = 120  # tokens of a conversation behind its prompt
ENDS = list(range(2, 130))  # tokens that end an answer: half of them, so that answers are short
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]"
    "{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def look(seed: int) -> list:
    """
    Look at a picture.

    Args:
        seed: Which one.
    """
    return [
        {"type": "text", "text": f"Picture {seed}: "},
        {"type": "image", "image": picture(seed, width=64)},
        {"type": "text", "text": " and that is all."},
    ]


def call_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every answer call the tool: what tiny models write means nothing."""

    def parse(self, ids, prefix):
        call = {"type": "function", "function": {"name": "look", "arguments": {"seed": len(prefix)}}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    monkeypatch.setattr(ToolTemplate, "parse", parse)


def make_looking(family: str, **options) -> Tiny:
    """A model and its processor, with a chat template that writes calls of tools and images in their results."""
    model, processor = make_tiny(family, **options)
    place = {"qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>", "gemma3": "<boi>"}
    place["qwen3_vl"] = place["qwen2_5_vl"]
    processor.chat_template = TEMPLATE.replace("IMAGE", place.get(family, "<image>"))
    processor.tokenizer.response_template = processor.tokenizer.response_schema = {}  # `call_always` parses
    return model, processor
