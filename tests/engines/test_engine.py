"""Prompts to tokens."""

import pytest
from conftest import make_model, make_tokenizer
from tokenizers import processors
from transformers import (
    FalconConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    Mamba2Config,
    MptConfig,
    OPTConfig,
)

from es_trainer.engines.base import context_length
from es_trainer.engines.transformers_engine import TransformersEngine


@pytest.fixture
def begins():
    """A tokenizer that begins every text with a token, as its chat template does."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<s>" + tokenizer.chat_template
    single = [("<s>", tokenizer.bos_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=single)
    return tokenizer


def test_a_text_that_begins_with_the_begin_token_gets_no_other(begins, config):
    engine = TransformersEngine(make_model(), begins, config())
    message = [{"role": "user", "content": "hi"}]
    rendered = begins.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    conversation, text, plain = *engine.tokenize([message]), *engine.tokenize([rendered]), *engine.tokenize(["hi"])
    assert text == conversation and text[:2].count(begins.bos_token_id) == 1
    assert plain[0] == begins.bos_token_id and len(plain) == 3


def test_a_text_that_begins_with_two_begin_tokens_keeps_them(tokenizer, config):
    engine = TransformersEngine(make_model(), tokenizer, config())
    assert engine.tokenize(["<s><s>a"])[0][:2] == [tokenizer.bos_token_id] * 2


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (GPT2Config(n_positions=64), 64),
        (GPTJConfig(n_positions=64), 64),
        (MptConfig(max_seq_len=64), 64),
        (OPTConfig(max_position_embeddings=64), 64),
        (FalconConfig(max_position_embeddings=64), 64),
        (FalconConfig(max_position_embeddings=64, alibi=True), None),
        (Mamba2Config(), None),
    ],
)
def test_context_length(config, length):
    assert context_length(config) == length


def test_the_context_of_gpt2(config):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=64, n_embd=32, n_layer=1, n_head=4, eos_token_id=2))
    engine = TransformersEngine(model, make_tokenizer(), config(max_completion_length=8))
    (completion,) = engine.generate(engine.tokenize(["a" * 56]), seed=0)
    assert completion.ids
    with pytest.raises(ValueError, match="Prompt 0 has 57 tokens.*more than the context of 64 tokens"):
        engine.tokenize(["a" * 57])
