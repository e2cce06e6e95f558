"""Rows that join, leave and come back, each with the logits of its own text."""

import pytest
import torch
from conftest import TINY, make_model
from transformers import AutoModelForCausalLM, DeepseekV3Config, Gemma3TextConfig, GPT2Config, Qwen3MoeConfig

from es_trainer.engines import PopulationBatch, TransformersEngine
from es_trainer.engines.decoding import Row
from es_trainer.engines.running_batch import RunningBatch
from es_trainer.evolution import EvolutionStrategy
from es_trainer.evolution.population import Member
from es_trainer.noise.shapes import LowRank


CONFIGS = {
    "gemma3": Gemma3TextConfig(
        **TINY, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3),
    "qwen3_moe": Qwen3MoeConfig(**TINY, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    # Whose keys and values are of different widths
    "deepseek_v3": DeepseekV3Config(
        **{**TINY, "num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        first_k_dense_replace=2,
    ),
}
ARCHITECTURES = ["llama", *CONFIGS]


def make(architecture: str):
    torch.manual_seed(0)
    model = make_model() if architecture == "llama" else AutoModelForCausalLM.from_config(CONFIGS[architecture])
    return model.eval()


def text(length: int, start: int = 3) -> list[int]:
    return [(start + 7 * i) % 250 for i in range(length)]


@torch.inference_mode()
def expected(model, tokens: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens])).logits[0, -1]


def check(batch, logits, model) -> None:
    wanted = torch.stack([expected(model, tokens) for tokens in batch.texts])
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_rows_join_and_leave_between_tokens(architecture):
    model = make(architecture)
    batch = RunningBatch(model)
    check(batch, batch.join([text(5), text(9, 4)], [0, 0], [None, None], room=2), model)
    check(batch, batch.step(torch.tensor([11, 12])), model)
    # One that is longer than what the others have read, and two of the same text
    logits = batch.join([text(20, 5), text(3, 6), text(3, 6)], [0] * 3, [None] * 3, room=1)
    wanted = torch.stack([expected(model, tokens) for tokens in batch.texts[2:]])
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    for token in range(3):  # more than there was room for
        check(batch, batch.step(torch.arange(5) + 20 + token), model)
    batch.keep([0, 3, 4])
    check(batch, batch.step(torch.tensor([31, 32, 33])), model)
    assert [len(tokens) for tokens in batch.texts] == [10, 7, 7]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_rows_come_back_with_what_they_have_read(architecture):
    model = make(architecture)
    batch = RunningBatch(model)
    batch.join([text(5), text(9, 4)], [0, 0], [None, None])
    batch.step(torch.tensor([11, 12]))
    caches = [batch.cache_of(0), batch.cache_of(1, 8)]
    if architecture == "gemma3":  # whose layers keep a window only
        assert caches == [None, None]
    else:
        assert [len(cache.ids) for cache in caches] == [6, 8]
    shapes = []
    model.register_forward_pre_hook(
        lambda model, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    # One goes on, one has other tokens from the 7th on, and one is new
    texts = [batch.texts[0] + text(4, 40), text(9, 4)[:6] + text(5, 50), text(3, 60)]
    again = RunningBatch(model)
    logits = again.join(texts, [0] * 3, [*caches, None])
    assert shapes == ([(3, 11)] if architecture == "gemma3" else [(3, 5)])
    check(again, logits, model)
    check(again, again.step(torch.tensor([1, 2, 3])), model)


def test_turns_of_members_are_those_that_are_computed_anew(tokenizer, config):
    model = make("llama")
    strategy = EvolutionStrategy(list(model.named_parameters()), population_size=4, perturbation=LowRank(1))
    engine = TransformersEngine(model, tokenizer, config(max_completion_length=6))
    rows = [Row(member, prompt, number) for member in range(2) for prompt in range(2) for number in range(2)]
    assert engine.drops_finished_rows
    with PopulationBatch(model, strategy.weights).install([Member(1), Member(2, -1)], 0.2) as members:
        caches: dict = {}
        # Two completions of a prompt differ from the second turn on
        texts = [text(6 + row.prompt) for row in rows]
        for turn in range(3):
            continued = engine.complete(texts, rows, 0, members, caches=caches)
            assert continued == engine.complete(texts, rows, 0, members)
            texts = [
                tokens + made.ids + text(3 + turn, 10 * row.number)
                for tokens, made, row in zip(texts, continued, rows, strict=True)
            ]
            assert all(
                caches[row].prefix_of(tokens) == len(caches[row].ids) for row, tokens in zip(rows, texts, strict=True)
            )
    assert len({tuple(made.ids) for made in continued}) > 4
