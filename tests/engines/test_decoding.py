import pytest
import torch
from conftest import TINY, make_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    MambaConfig,
    MistralConfig,
    MoshiConfig,
    MptConfig,
    Qwen3MoeConfig,
)

from es_trainer.engines import PopulationBatch, TransformersEngine, decoding, running_batch
from es_trainer.evolution import EvolutionStrategy
from es_trainer.noise.shapes import Gaussian, LowRank


PROMPTS = ["Say one", "Hi", "A much longer prompt than the others", "Three", "Hello", "To be or not"]
ENDS = [2, *range(100, 130)]
TWO_KINDS = ["sliding_attention", "full_attention"]
CONFIGS = {
    "mistral": MistralConfig(**TINY, sliding_window=8),
    "gemma3": Gemma3TextConfig(**TINY, head_dim=8, sliding_window=8, layer_types=TWO_KINDS, tie_word_embeddings=False),
    # Whose mask does not know of the window: only its cache does
    "moshi": MoshiConfig(**TINY, head_dim=8, ffn_dim=64, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3),
    "qwen3_moe": Qwen3MoeConfig(**TINY, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mamba": MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3),
    # Whose positions are wrong where several tokens follow on what was read before
    "mpt": MptConfig(vocab_size=259, d_model=32, n_heads=4, n_layers=2, max_seq_len=256, initializer_range=0.3),
}


def make(architecture: str):
    """A model that ends its completions at different lengths."""
    torch.manual_seed(0)
    model = make_model() if architecture == "llama" else AutoModelForCausalLM.from_config(CONFIGS[architecture])
    model.generation_config.eos_token_id = ENDS
    return model.eval()


@pytest.fixture
def engine(tokenizer, config):
    def make_engine(model=None, **options) -> TransformersEngine:
        options = {"max_completion_length": 16, **options}
        return TransformersEngine(model or make("llama"), tokenizer, config(**options))

    return make_engine


def generate(engine, prompts=PROMPTS, seed=0, num_generations=1, **options):
    return engine.generate(engine.tokenize(prompts), seed, num_generations, **options)


def lengths(completions) -> list[int]:
    return [len(completion.ids) for completion in completions]


def by_transformers(engine, **options):
    """What Transformers' own loop makes of it."""
    assert engine.drops_finished_rows
    engine.drops_finished_rows = False
    try:
        return generate(engine, **options)
    finally:
        engine.drops_finished_rows = True


def calls(engine) -> list[tuple[int, ...]]:
    """Shapes of the forward passes from now on."""
    assert engine.drops_finished_rows  # which is tried once
    shapes = []

    def record(model, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    engine.model.register_forward_pre_hook(record, with_kwargs=True)
    return shapes


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "moshi", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
def test_completions_are_those_of_transformers_own_loop(engine, architecture, options):
    engine = engine(make(architecture), **options)
    completions = generate(engine, num_generations=3)
    assert completions == by_transformers(engine, num_generations=3)
    assert len(set(lengths(completions))) > 2
    assert max(lengths(completions)) > 8


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "moshi", "gpt2", "qwen3_moe"])
def test_prompts_of_one_length_need_no_mask(engine, architecture):
    engine = engine(make(architecture), temperature=1.0)
    prompts = ["Say one", "Say two", "Tell me"]
    completions = generate(engine, prompts=prompts, num_generations=4)
    assert completions == by_transformers(engine, prompts=prompts, num_generations=4)
    assert len(set(lengths(completions))) > 2


# A value of each option that `Decoding` follows
OPTIONS = {
    "bad_words_ids": [[token] for token in range(10, 70)],
    "begin_suppress_tokens": [*range(3, 259, 2)],
    "suppress_tokens": [*range(10, 70)],
    "sequence_bias": [[[token], 50.0] for token in range(10, 70)],
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 1.8,
    "forced_eos_token_id": 99,
    "exponential_decay_length_penalty": (2, 3.0),
    "eos_token_id": [*range(2, 100)],
    "max_new_tokens": 1,
    "max_time": 0.0,
    "min_length": 45,
    "min_new_tokens": 5,
}
# And of those that change nothing here: prompts have more than one token, and logits are numbers
WITHOUT_TRACE = {
    "forced_bos_token_id": 99,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "bos_token_id": 5,
    "pad_token_id": 5,
    "cache_config": {"backend": "quanto"},
    "disable_compile": True,
    "max_cache_len": 100,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", [name for name in decoding.FOLLOWED if name in vars(GenerationConfig())])
def test_options_do_what_they_do_in_transformers_own_loop(engine, name, temperature):
    plain = generate(engine(temperature=temperature), num_generations=2)
    engine = engine(temperature=temperature, generation_kwargs={name: (OPTIONS | WITHOUT_TRACE)[name]})
    completions = generate(engine, num_generations=2)
    assert completions == by_transformers(engine, num_generations=2)
    assert (completions == plain) == (name in WITHOUT_TRACE)


@pytest.mark.parametrize(
    "name", [*sorted(vars(GenerationConfig()).keys() - {*decoding.FOLLOWED}), "of_a_later_version"]
)
def test_other_options_are_not_followed(name):
    config = GenerationConfig()
    assert decoding.follows(config)
    setattr(config, name, "something")
    assert not decoding.follows(config)


def test_stop_strings_stop_rows_at_different_times(engine):
    options = {"temperature": 1.0, "max_completion_length": 24}
    texts = [completion.text for completion in generate(engine(**options), num_generations=3)]
    strings = [ch for ch in sorted(set("".join(text[4:] for text in texts))) if ch.isascii() and ch.isprintable()][:12]
    engine = engine(**options, generation_kwargs={"stop_strings": strings})
    shapes = calls(engine)
    completions = generate(engine, num_generations=3)
    assert len({rows for rows, width in shapes if width == 1}) > 2
    assert completions == by_transformers(engine, num_generations=3)
    stopped = [completion for completion in completions if completion.text and completion.text[-1] in strings]
    assert len(set(lengths(stopped))) > 3
    for completion in completions:
        assert not set(completion.text[:-1]) & set(strings)


@pytest.mark.parametrize("share", [0, 1 / 8, 1 / 2, 1])
def test_when_finished_rows_leave_changes_nothing(engine, share, monkeypatch):
    engine = engine(temperature=1.0, repetition_penalty=1.3)
    expected = by_transformers(engine, num_generations=3)
    monkeypatch.setattr(decoding, "FINISHED_SHARE", share)
    assert generate(engine, num_generations=3) == expected


def test_finished_rows_leave_the_batch(engine):
    engine = engine(temperature=1.0)
    shapes = calls(engine)
    ends = lengths(generate(engine, num_generations=4))
    decoded = [rows for rows, width in shapes if width == 1]
    shapes.clear()
    by_transformers(engine, num_generations=4)
    by_their_loop = [rows for rows, width in shapes if width == 1]

    assert decoded == sorted(decoded, reverse=True)
    assert len(set(decoded)) > 3
    for step, rows in enumerate(decoded, 1):
        unfinished = sum(end > step for end in ends)
        assert unfinished <= rows < unfinished + max(1, rows / 8)
    assert sum(decoded) < 0.8 * sum(by_their_loop)


def test_the_batch_ends_when_all_rows_have(engine):
    model = make("llama")
    model.generation_config.eos_token_id = list(range(2, 259))
    engine = engine(model)
    shapes = calls(engine)
    assert set(lengths(generate(engine))) == {1}
    assert [width for _, width in shapes if width == 1] == []


@pytest.mark.parametrize("tokens", [1, 20, 60, 10**6])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_are_computed_once_for_each_member(engine, tokens, temperature, monkeypatch):
    model = make("llama")
    optimizer = evolution(model, LowRank(1))
    engine = engine(model, temperature=temperature)
    shapes = calls(engine)
    with PopulationBatch(model, optimizer.weights).install(list(optimizer.ask()), 0.05) as rows:
        expected = by_transformers(engine, num_generations=4, members=rows)
        monkeypatch.setitem(running_batch.PREFILL_TOKENS, "cpu", tokens)
        shapes.clear()
        assert generate(engine, num_generations=4, members=rows) == expected
    prompts = sorted(len(prompt) for prompt in PROMPTS for _ in range(3))
    prefills = [shape for shape in shapes if shape[1] > 1]
    assert sum(count for count, _ in prefills) == len(prompts)
    for count, width in prefills:
        mine, prompts = prompts[:count], prompts[count:]
        assert width == mine[-1]
        assert count * width <= tokens or count == 1
        assert not prompts or (count + 1) * prompts[0] > tokens


def evolution(model, perturbation, size=3):
    return EvolutionStrategy(
        list(model.named_parameters()), sigma=0.05, population_size=size, perturbation=perturbation
    )


def alone(engine, optimizer, members, **options):
    completions = []
    for member in members:
        optimizer.perturb(member)
        completions += by_transformers(engine, **options)
    optimizer.restore()
    return completions


@pytest.mark.parametrize("share", [0, 1 / 8])
@pytest.mark.parametrize(
    "perturbation", [LowRank(1), LowRank(3), Gaussian()], ids=["LowRank1", "LowRank3", "Gaussian"]
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "moshi", "gpt2", "qwen3_moe"])
def test_members_keep_their_weights_when_other_rows_leave(engine, architecture, perturbation, share, monkeypatch):
    monkeypatch.setattr(decoding, "FINISHED_SHARE", share)
    model = make(architecture)
    optimizer = evolution(model, perturbation, size=4)
    members = list(optimizer.ask())
    engine = engine(model, temperature=2.0, max_completion_length=32)
    expected = alone(engine, optimizer, members, num_generations=2)
    with PopulationBatch(model, optimizer.weights).install(members, optimizer.sigma) as rows:
        assigned, assign = [], rows.assign
        monkeypatch.setattr(rows, "assign", lambda members: assigned.append(list(members)) or assign(members))
        shapes = calls(engine)
        completions = generate(engine, num_generations=2, members=rows)
    assert completions == expected
    # Departures leave members with different numbers of rows, and some with none
    counts = [[batch.count(member) for member in range(4)] for batch in assigned]
    assert any(min(count) > 0 and len(set(count)) > 1 for count in counts)
    assert any(0 in count for count in counts)
    assert {rows for rows, width in shapes if width == 1} <= {sum(count) for count in counts}
    per_member = [completions[start : start + 12] for start in range(0, 48, 12)]
    assert all(one != other for i, one in enumerate(per_member) for other in per_member[:i])


@pytest.mark.parametrize("perturbation", [LowRank(1), Gaussian()], ids=["LowRank1", "Gaussian"])
@pytest.mark.parametrize("batch_size", [1, 5, 7])
def test_members_are_told_apart_in_batches_of_any_size(engine, perturbation, batch_size):
    model = make("llama")
    optimizer = evolution(model, perturbation)
    members = list(optimizer.ask())
    engine = engine(model, temperature=1.0)
    expected = alone(engine, optimizer, members, num_generations=2)
    with PopulationBatch(model, optimizer.weights).install(members, optimizer.sigma) as rows:
        assert generate(engine, num_generations=2, members=rows, batch_size=batch_size) == expected


@pytest.mark.parametrize("perturbation", [LowRank(1), Gaussian()], ids=["LowRank1", "Gaussian"])
def test_a_static_cache_gives_the_same_for_members(engine, perturbation):
    model = make("llama")
    optimizer = evolution(model, perturbation)
    members = list(optimizer.ask())
    default, static = engine(model), engine(model, cache_implementation="static")
    static.generation_config.disable_compile = True
    assert default.drops_finished_rows and not static.drops_finished_rows
    with PopulationBatch(model, optimizer.weights).install(members, optimizer.sigma) as rows:
        expected = generate(default, members=rows)
        assert generate(static, members=rows) == expected
    assert len({completion.text for completion in expected}) > len(PROMPTS)


# ---- where Transformers' own loop is needed ----


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"generation_kwargs": {"use_cache": False}},
        {"generation_kwargs": {"prefill_chunk_size": 4}},
    ],
    ids=["static", "no_cache", "chunks"],
)
def test_other_caches_are_left_to_transformers_and_give_the_same(engine, options):
    expected = generate(engine())
    other = engine(**options)
    assert not other.drops_finished_rows
    assert generate(other) == expected


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"num_beams": 2}),
        ("llama", {"encoder_repetition_penalty": 2.0}),
        ("llama", {"encoder_no_repeat_ngram_size": 2}),
        ("mamba", {}),
        ("mpt", {}),
    ],
    ids=str,
)
def test_what_decoding_does_not_know_is_left_to_transformers(engine, tokenizer, architecture, options):
    alone = {"perturbation": "gaussian", "population_batch_size": 1}
    engine = engine(make(architecture), generation_kwargs=options, **alone)
    assert not engine.drops_finished_rows
    prompts = ["Say one", "Say two"]
    inputs = tokenizer(prompts, return_tensors="pt")
    width = inputs["input_ids"].shape[1]
    outputs = engine.model.generate(**inputs, **options, max_new_tokens=16, do_sample=False, pad_token_id=0)
    for completion, output in zip(generate(engine, prompts), outputs[:, width:].tolist(), strict=True):
        assert completion.ids == output[: len(completion.ids)]
        assert completion.truncated or completion.ids[-1] in ENDS
        assert set(output[len(completion.ids) :]) <= {0, 2}


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 1}, {"cache_implementation": "dynamic"}, {"encoder_repetition_penalty": 1.0}, {"min_p": 0.1}],
    ids=str,
)
def test_options_without_effect_on_rows_do_not_matter(engine, options):
    assert engine(generation_kwargs=options).drops_finished_rows
