"""A tiny model that calls a tool and answers with what that returned: it was trained on nothing else."""

import functools
from collections.abc import Callable

import pytest
import torch
import trl
from conftest import make_model, make_tokenizer
from packaging.version import Version
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import get_json_schema
from trl import chat_template_utils

from es_trainer.agents.conversation import TRL_NEEDED


needs_tools = pytest.mark.skipif(
    Version(trl.__version__) < Version(TRL_NEEDED), reason=f"TRL parses calls of tools since {TRL_NEEDED}"
)


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


class Sums:
    """Rewards the sum of all that was added since the last reset."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.results = None

    def reset(self, **row):
        self.results = []

    def add(self, a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        self.results.append(a + b)
        return a + b

    def get_reward(self) -> float:
        (result,) = self.results  # of this rollout alone
        return float(result)

    @property
    def broken(self):
        raise AssertionError("properties are no tools")


QUESTIONS = {"two and three?": (2, 3), "one and one?": (1, 1)}
PROMPTS = [[{"role": "user", "content": question}] for question in QUESTIONS]

# vLLM's attention on CPU knows no shorter heads
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "tie": False}


def calling_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = chat_template_utils.qwen2_5_chat_template
    # Markers are one token each, as in Qwen's tokenizer. So is what stands around the tools, most of a prompt
    around = tokenizer.apply_chat_template(PROMPTS[0], tools=[{}], tokenize=False)
    before, _, after = around.partition("\n{}\n")
    tokenizer.add_tokens(
        ["<tool_call>", "</tool_call>", before[before.index("You are") :], after[: after.index("<|im_end|>")]]
    )
    return tokenizer


def conversation(question: str) -> list[dict]:
    a, b = QUESTIONS[question]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": b}}}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": str(a + b)},
        {"role": "assistant", "content": f"It is {a + b}."},
    ]


def train(lessons: list[tuple[list[Callable], list[dict]]], enough: float = 2e-3) -> tuple[LlamaForCausalLM, int]:
    """
    A model that has learned some conversations by heart, each with its tools, and how many tokens the longest of them
    has behind its prompt.
    """
    tokenizer = calling_tokenizer()
    model = make_model(vocab_size=len(tokenizer), initializer_range=0.02, **SHAPE)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    texts, prompts = [], []
    for tools, messages in lessons:
        schemas = [get_json_schema(tool) for tool in tools]
        texts.append(tokenizer.apply_chat_template(messages, tools=schemas, return_dict=False))
        first = tokenizer.apply_chat_template(
            messages[:1], tools=schemas, add_generation_prompt=True, return_dict=False
        )
        prompts.append(len(first))
    width = max(map(len, texts))
    ids = torch.tensor([text + [tokenizer.pad_token_id] * (width - len(text)) for text in texts])
    labels = torch.full_like(ids, -100)
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        labels[row, prompt : len(text)] = ids[row, prompt : len(text)]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(400):
        some = torch.arange(4 * step, 4 * step + 4).unique() % len(ids) if len(ids) > 4 else torch.arange(len(ids))
        given, wanted = ids[some], labels[some]
        loss = model(input_ids=given, attention_mask=(given != tokenizer.pad_token_id).long(), labels=wanted).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss < enough:
            break
    assert loss < 0.05, f"the model has not learned to call tools: {loss}"
    return model, max(len(text) - prompt for text, prompt in zip(texts, prompts, strict=True))


@functools.cache
def trained_weights() -> tuple[LlamaForCausalLM, int]:
    """The model, and how many tokens a whole conversation has behind its prompt."""
    return train([([add], conversation(question)) for question in QUESTIONS])


def calling_model() -> LlamaForCausalLM:
    trained, _ = trained_weights()
    model = make_model(vocab_size=trained.config.vocab_size, **SHAPE)
    model.load_state_dict(trained.state_dict())
    model.generation_config.eos_token_id = trained.config.eos_token_id
    return model
