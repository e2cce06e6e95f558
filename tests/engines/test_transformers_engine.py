import pytest
import torch
from conftest import make_model
from transformers import (
    CpmAntConfig,
    CpmAntForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RwkvConfig,
    RwkvForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from es_trainer.engines import TransformersEngine


PROMPTS = ["Say one", "Hi", "A much longer prompt than the others", "Three", "x"]


@pytest.fixture
def engine(tokenizer, config):
    def make(model=None, **options) -> TransformersEngine:
        return TransformersEngine(model or make_model(), tokenizer, config(**options))

    return make


def generate(engine, prompts=PROMPTS, seed=0, num_generations=1, **options):
    return engine.generate(engine.tokenize(prompts), seed, num_generations, **options)


def test_a_batch_gives_what_each_prompt_gives_alone(engine):
    engine = engine(max_completion_length=12)
    alone = [generate(engine, [prompt])[0] for prompt in PROMPTS]
    assert generate(engine) == alone
    assert len({completion.text for completion in alone}) > 2


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_batch_size_changes_nothing(engine, size):
    engine = engine(temperature=1.0, num_generations=2)
    assert generate(engine, num_generations=2, batch_size=size) == generate(engine, num_generations=2)


def test_batch_size_is_the_most_sequences_at_once(engine, monkeypatch):
    engine = engine()
    assert engine.drops_finished_rows  # which is tried once
    sizes = []
    generate_batch = engine.model.generate
    monkeypatch.setattr(
        engine.model,
        "generate",
        lambda input_ids, **kw: sizes.append(len(input_ids)) or generate_batch(input_ids, **kw),
    )
    generate(engine, batch_size=2)
    assert sizes == [2, 2, 1]


def test_greedy_is_transformers_own(engine, tokenizer):
    engine = engine(max_completion_length=10)
    inputs = tokenizer("Say one", return_tensors="pt")
    expected = engine.model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    (completion,) = generate(engine, ["Say one"])
    assert completion.ids == expected.tolist()[: len(completion.ids)]


def test_completions_end_with_the_end_of_sequence_token(engine):
    # With the end-of-sequence token among the likely ones, some completions end and others are cut
    model = make_model()
    model.generation_config.eos_token_id = [2, *range(100, 112)]
    engine = engine(model, max_completion_length=16, temperature=1.0)
    completions = generate(engine)
    assert {completion.truncated for completion in completions} == {True, False}
    for completion in completions:
        ends = [token in engine.eos_token_ids for token in completion.ids]
        assert not any(ends[:-1])
        assert ends[-1] != completion.truncated
        assert len(completion.ids) == 16 or not completion.truncated


def test_every_end_token_that_model_and_tokenizer_declare_ends(engine):
    model = make_model()
    model.generation_config.eos_token_id = [7, 9]
    assert engine(model).eos_token_ids == [7, 9, 2]
    model.generation_config.eos_token_id = None
    assert engine(model).eos_token_ids == [2]


def test_random_numbers_depend_on_seed_prompt_completion_and_position_only(engine):
    sampler = engine(temperature=1.0, num_generations=3)
    first = generate(sampler, seed=5, num_generations=3)
    assert generate(sampler, seed=5, num_generations=3) == first
    assert generate(sampler, seed=6, num_generations=3) != first
    assert len({completion.text for completion in first[:3]}) == 3
    # The same place in the batch, the same draws: a prompt's completions do not hang on the other prompts' length
    shorter = generate(sampler, ["Say one", "Hi"], seed=5, num_generations=3)
    assert shorter == first[:6]
    # The global random state has no part in it
    torch.manual_seed(1)
    assert generate(sampler, seed=5, num_generations=3) == first


def test_prompts_and_positions_have_draws_of_their_own(engine):
    # At this temperature only the draws decide
    sampler = engine(temperature=1e6, num_generations=2)
    completions = generate(sampler, ["Say one", "Say one"], num_generations=2)
    assert len({completion.text for completion in completions}) == 4
    assert all(len(set(completion.ids)) > len(completion.ids) / 2 for completion in completions)


def test_samples_follow_the_models_distribution(engine, tokenizer):
    engine = engine(temperature=0.7, num_generations=3000, max_completion_length=1, top_k=5)
    (ids,) = engine.tokenize(["Say one"])
    logits = engine.model(torch.tensor([ids])).logits[0, -1] / 0.7
    top = logits.topk(5)
    probabilities = dict(zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True))
    tokens = [completion.ids[0] for completion in generate(engine, ["Say one"], num_generations=3000)]
    assert set(tokens) <= set(probabilities)
    for token, probability in probabilities.items():
        spread = (probability * (1 - probability) / 3000) ** 0.5
        assert tokens.count(token) / 3000 == pytest.approx(probability, abs=4.5 * spread)


@pytest.mark.parametrize(("option", "value"), [("top_p", 0.3), ("min_p", 0.5), ("top_k", 1), ("temperature", 0.01)])
def test_each_sampling_option_narrows_the_choice(engine, option, value):
    def distinct(**options) -> int:
        sampler = engine(**{"temperature": 3.0, "num_generations": 200, "max_completion_length": 1, **options})
        return len({completion.ids[0] for completion in generate(sampler, ["Say one"], num_generations=200)})

    assert distinct(**{option: value}) < distinct() / 2


def test_generation_kwargs_override(engine):
    (plain,) = generate(engine(max_completion_length=8), ["Say one"])
    first = plain.ids[0]
    (suppressed,) = generate(engine(generation_kwargs={"suppress_tokens": [first]}), ["Say one"])
    assert first not in suppressed.ids
    (longer,) = generate(engine(generation_kwargs={"max_new_tokens": 20, "min_new_tokens": 20}), ["Say one"])
    assert len(longer.ids) == 20 and longer.truncated
    (stopped,) = generate(engine(generation_kwargs={"stop_strings": [plain.text[0]]}), ["Say one"])
    assert len(stopped.ids) < 8 and not stopped.truncated
    (sampled,) = generate(engine(generation_kwargs={"temperature": 5.0}), ["Say one"])
    assert sampled != plain


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["decoding", "transformers"])
def test_what_ends_at_the_limit_is_not_truncated(engine, options):
    prompts = ["Say seven", "Say four"]
    plain = generate(engine(max_completion_length=3), prompts)
    first, second = (completion.ids for completion in plain)
    assert [completion.truncated for completion in plain] == [True, True]
    last = engine().tokenizer.decode(first[2])
    assert last.isascii() and first[2] not in first[:2] + second  # it can end the first, and at the limit
    for given in ({"stop_strings": [last]}, {"eos_token_id": first[2]}, {"eos_token_id": [first[2]]}):
        completions = generate(engine(max_completion_length=3, generation_kwargs=given, **options), prompts)
        assert [completion.ids for completion in completions] == [first, second]
        assert [completion.truncated for completion in completions] == [False, True]


def test_end_tokens_that_are_given_take_the_place_of_others(engine):
    (plain,) = generate(engine(max_completion_length=8), ["Say one"])
    (ended,) = generate(engine(max_completion_length=8, generation_kwargs={"eos_token_id": plain.ids[1]}), ["Say one"])
    assert ended.ids == plain.ids[:2] and not ended.truncated
    assert engine(generation_kwargs={"eos_token_id": 5}).eos_token_ids == [5]


def test_repetition_penalty_and_cache_implementation_reach_generate(engine):
    engine = engine(repetition_penalty=1.7, cache_implementation="static")
    assert engine.generation_config.repetition_penalty == 1.7
    assert engine.generation_config.cache_implementation == "static"
    assert len(generate(engine)) == len(PROMPTS)


def test_the_models_own_sampling_defaults_do_not_leak_in(engine):
    model = make_model()
    expected = generate(engine(model))
    model.generation_config.update(do_sample=True, temperature=9.0, top_k=3, repetition_penalty=1.5)
    assert generate(engine(model)) == expected


def test_conversations_go_through_the_chat_template(engine, tokenizer):
    conversation = [{"role": "user", "content": "Hello"}]
    (ids,) = engine().tokenize([conversation])
    assert tokenizer.decode(ids) == "<|user|>Hello</s><|assistant|>"


def test_chat_template_kwargs(config, tokenizer):
    tokenizer.chat_template, before = "{{ greeting }}", tokenizer.chat_template
    try:
        engine = TransformersEngine(make_model(), tokenizer, config(chat_template_kwargs={"greeting": "Yo"}))
        (ids,) = engine.tokenize([[{"role": "user", "content": "Hello"}]])
    finally:
        tokenizer.chat_template = before
    assert tokenizer.decode(ids) == "Yo"


def test_conversations_need_a_chat_template(engine, tokenizer):
    engine = engine()
    tokenizer.chat_template, before = None, tokenizer.chat_template
    try:
        with pytest.raises(ValueError, match="no chat template"):
            engine.tokenize([[{"role": "user", "content": "Hello"}]])
    finally:
        tokenizer.chat_template = before


def test_prompts_must_leave_room_for_the_completion(engine):
    engine = engine(max_completion_length=200)
    engine.tokenize(["x" * 56])
    with pytest.raises(ValueError, match="Prompt 1 has 57 tokens.*max_completion_length=200.*256"):
        engine.tokenize(["x", "x" * 57])
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        engine.tokenize(["x", ""])


# ---- logits that are not numbers ----

LOOPS = {
    "decoding": {},
    "decoding, sampled": {"temperature": 1.0},
    "static": {"cache_implementation": "static", "generation_kwargs": {"disable_compile": True}},
    "no_cache, sampled": {"temperature": 1.0, "generation_kwargs": {"use_cache": False}},
    "beams": {"generation_kwargs": {"num_beams": 2}, "perturbation": "gaussian", "population_batch_size": 1},
}


@pytest.mark.parametrize("loop", LOOPS)
def test_logits_that_are_nan_are_named(engine, loop):
    model = make_model()
    engine = engine(model, **LOOPS[loop])
    assert engine.drops_finished_rows == loop.startswith("decoding")
    assert len(generate(engine)) == len(PROMPTS)
    # Of one token in one prompt
    (token,) = engine.tokenizer("x", add_special_tokens=False)["input_ids"]
    model.model.embed_tokens.weight.data[token] = float("nan")
    with pytest.raises(FloatingPointError, match=r"The model's logits are not numbers \(NaN\)"):
        generate(engine)


# ---- the model's own generation config ----


def test_a_models_beams_and_outputs_do_not_leak_in(engine):
    expected = generate(engine(make_model()))
    model = make_model()
    model.generation_config.update(
        num_beams=3,
        num_return_sequences=2,
        return_dict_in_generate=True,
        token_healing=True,
        prompt_lookup_num_tokens=2,
    )
    own = model.generation_config
    assert generate(engine(model)) == expected
    assert model.generation_config is own


def test_a_models_suppressed_tokens_and_stop_strings_are_in_effect(engine):
    (plain,) = generate(engine(make_model()), ["Say one"])
    model = make_model()
    model.generation_config.suppress_tokens = [plain.ids[0]]
    (suppressed,) = generate(engine(model), ["Say one"])
    assert plain.ids[0] not in suppressed.ids
    model = make_model()
    model.generation_config.stop_strings = [plain.text[0]]
    (stopped,) = generate(engine(model), ["Say one"])
    assert len(stopped.ids) < len(plain.ids) and not stopped.truncated


@pytest.mark.parametrize("as_list", [False, True])
def test_an_end_token_of_ones_own(engine, as_list):
    (plain,) = generate(engine(), ["Say one"])
    end = plain.ids[1]
    own = engine(generation_kwargs={"eos_token_id": [end] if as_list else end})
    (completion,) = generate(own, ["Say one"])
    assert completion.ids == plain.ids[: plain.ids.index(end) + 1]
    assert not completion.truncated


# ---- models that keep what they have read elsewhere than in a cache, or not at all ----

SMALL = {"vocab_size": 259, "n_layer": 2, "n_head": 4}
STATEFUL = {
    "rwkv": lambda: RwkvForCausalLM(
        RwkvConfig(vocab_size=259, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    ),
    "xlnet": lambda: XLNetLMHeadModel(XLNetConfig(d_model=32, d_inner=64, **SMALL)),
    "openai": lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(n_positions=128, n_embd=32, **SMALL)),
    "cpmant": lambda: CpmAntForCausalLM(
        CpmAntConfig(vocab_size=259, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=64, num_hidden_layers=2)
    ),
}


@pytest.mark.parametrize("architecture", STATEFUL)
def test_models_without_a_cache_are_left_to_transformers(engine, tokenizer, architecture):
    torch.manual_seed(0)
    model = STATEFUL[architecture]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    engine = engine(model, max_completion_length=6)
    assert not engine.drops_finished_rows
    inputs = tokenizer("Say one", return_tensors="pt")
    expected = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=engine.eos_token_ids,
        pad_token_id=0,
    )[0, inputs["input_ids"].shape[1] :]
    (completion,) = generate(engine, ["Say one"])
    assert completion.ids == expected.tolist()[: len(completion.ids)]


@pytest.mark.parametrize("own_loop", [True, False])
def test_a_frozen_head_reads_contiguous_hidden_states(engine, own_loop, monkeypatch):
    # Of a view and a weight without gradient, torch makes a product for each row, with a copy of the weight for each
    model = make_model().requires_grad_(False)
    engine, again = engine(model), engine(model)
    monkeypatch.setattr(engine, "drops_finished_rows", own_loop)
    generate(again)
    read = []
    model.get_output_embeddings().register_forward_hook(lambda head, args, output: read.append(args[0]))
    generate(engine)
    assert len(read) > 1 and all(hidden.is_contiguous() for hidden in read)
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 1
