"""What a model's own generation config has a say in."""

import pytest
from transformers import CompileConfig, GenerationConfig, WatermarkingConfig

from es_trainer.engines.generation_config import KEPT, generation_config


# What the run says, whatever the model's own config has: how completions are drawn and how long they are
RUN = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "max_new_tokens", "max_length", "max_time", "num_return_sequences", "use_cache"),
    *("bos_token_id", "pad_token_id", "eos_token_id"),
}
# Ways to decode that are asked for in `generation_kwargs` or not at all: beams, drafts of other models, ...
WAYS = {
    *("num_beams", "num_beam_groups", "early_stopping", "length_penalty", "diversity_penalty", "constraints"),
    *("force_words_ids", "low_memory", "penalty_alpha", "dola_layers", "token_healing", "use_mtp", "is_assistant"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type"),
}
# What is no part of a completion
OTHERS = {
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("decoder_start_token_id", "continuous_batching_config", "transformers_version"),
}
FIELDS = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
# A value of each field that is kept
VALUES = {
    "bad_words_ids": [[5]],
    "begin_suppress_tokens": [5],
    "suppress_tokens": [5],
    "sequence_bias": [[[5], 1.0]],
    "no_repeat_ngram_size": 3,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "exponential_decay_length_penalty": (2, 1.5),
    "encoder_no_repeat_ngram_size": 3,
    "encoder_repetition_penalty": 1.5,
    "guidance_scale": 1.5,
    "watermarking_config": WatermarkingConfig(),
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "min_length": 3,
    "min_new_tokens": 3,
    "stop_strings": ["end"],
    "cache_config": {"backend": "quanto"},
    "cache_implementation": "static",
    "compile_config": CompileConfig(),
    "disable_compile": True,
    "max_cache_len": 100,
    "prefill_chunk_size": 4,
}


def of_run(own: GenerationConfig, tokenizer, args) -> dict:
    config, sampling = generation_config(own, tokenizer, [2], args)
    return vars(config) | {"sampling": sampling}


def test_every_field_is_decided_upon():
    """A field that is new has to be put into one of the four."""
    assert FIELDS - {*KEPT} - RUN - WAYS - OTHERS == set()
    assert not {*KEPT} & (RUN | WAYS | OTHERS)


@pytest.mark.parametrize("name", [name for name in KEPT if name in FIELDS])
def test_what_is_kept_is_in_effect(name, tokenizer, config):
    own = GenerationConfig()
    setattr(own, name, VALUES[name])
    assert of_run(own, tokenizer, config())[name] == VALUES[name]


@pytest.mark.parametrize("given", [0, 7])
def test_what_the_run_says_goes_before_what_is_kept(given, tokenizer, config):
    own = GenerationConfig(min_new_tokens=3)
    assert of_run(own, tokenizer, config(generation_kwargs={"min_new_tokens": given}))["min_new_tokens"] == given


@pytest.mark.parametrize("name", sorted((RUN | WAYS | OTHERS) & FIELDS))
def test_the_rest_is_left_aside(name, tokenizer, config):
    own = GenerationConfig()
    expected = of_run(own, tokenizer, config())
    setattr(own, name, "something")
    assert of_run(own, tokenizer, config()) == expected
