"""
Every causal language model of Transformers that builds from a small config: members together against one at a time,
completions against the model's own `generate`, and bfloat16 where the model knows it. `make slow`.
"""

import logging
from inspect import signature

import pytest
import torch
from conftest import TINY_RUN, letters, make_tokenizer
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from es_trainer import ESConfig, ESTrainer
from es_trainer.checks import check_model


pytestmark = pytest.mark.slow

TOKENS = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# What a dimension is called, and how large it is in a small model
SIZES = {
    32: ("hidden_size", "n_embd", "d_model", "embed_dim", "attention_hidden_size", "word_embed_proj_dim", "lru_width"),
    64: (
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "d_ff",
        "d_inner",
        "decoder_ffn_dim",
        "encoder_ffn_dim",
        "ffn_hidden_size",
    ),
    2: (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "decoder_layers",
        "encoder_layers",
        "num_experts_per_tok",
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"),
        *("encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"),
    ),
    8: (
        "head_dim",
        "d_kv",
        "dim_head",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
    ),
    16: ("moe_intermediate_size", "shared_expert_intermediate_size", "mamba_d_state", "state_size", "sliding_window"),
    256: ("max_position_embeddings", "n_positions", "max_seq_len", "context_length"),
}
OTHERS = {"num_key_value_heads": 2, "n_group": 1, "topk_group": 1, "initializer_range": 0.3, "layer_types": None}
LARGEST = 20_000_000  # weights of a model that counts as small
ENOUGH = 40  # architectures that are to be compared

DATA = Dataset.from_list([{"prompt": prompt} for prompt in ("Say one", "A longer prompt than the other")])
KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

found: dict[str, str] = {}  # what became of each architecture


def small_config(kind: str):
    """The architecture's config with its sizes shrunk."""
    default = AutoConfig.for_model(kind)
    sizes = {name: size for size, names in SIZES.items() for name in names} | OTHERS
    known = default.to_dict()
    changes = {name: size for name, size in sizes.items() if known.get(name) is not None}
    return type(default)(**changes, **TOKENS)


def build(kind: str):
    """A small model, or a skipped test."""
    try:
        config = small_config(kind)
        with torch.device("meta"):
            weights = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
        if weights > LARGEST:
            raise ValueError(f"{weights} weights are too many")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        model(input_ids=torch.tensor([[5, 6, 7]]))
        check_model(model, make_tokenizer())
    except Exception as error:  # whatever a config raises that does not like its sizes
        pytest.skip(f"{kind} does not build: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    return model


def make_trainer(model, folder, **options) -> ESTrainer:
    args = ESConfig(str(folder), **{**TINY_RUN, "perturbation": "low_rank", "population_size": 2, **options})
    return ESTrainer(model, letters, args, DATA, DATA, processing_class=make_tokenizer())


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.arange(10, 38).view(4, 7)  # different tokens in every row
    options = {}
    if "position_ids" in signature(model.forward).parameters:  # as generation gives them, a row for each row
        options["position_ids"] = torch.arange(7).repeat(4, 1)
    return model(input_ids=ids, use_cache=False, **options).logits.float()


def distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine - theirs).norm() / theirs.norm())


def members_together(run: ESTrainer, members) -> torch.Tensor:
    with run.population_batch.install(members, run.args.sigma) as rows:
        rows.assign([0, 0, 1, 1])
        return logits(run.model)


def members_alone(run: ESTrainer, members) -> torch.Tensor:
    answers = []
    for member in members:
        run.optimizer.perturb(member)
        answers.append(logits(run.model))
    run.optimizer.restore()
    return torch.cat([answers[0][:2], answers[1][2:]])


def own_completions(model, ids) -> list[list[int]]:
    completions = []
    for prompt in ids:
        x = torch.tensor([prompt])
        y = model.generate(
            input_ids=x,
            attention_mask=torch.ones_like(x),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=2,
            pad_token_id=0,
        )
        completions.append(y[0, len(prompt) :].tolist())
    return completions


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    model = build(kind)
    with caplog.at_level("WARNING"):
        run = make_trainer(model, tmp_path)
    with run.optimizer.weights.in_working_dtype():
        if run.population_batch is None:
            (reason,) = [r.message for r in caplog.records if "one at a time" in r.message]
            found[kind] = reason.split("at once: ")[1]
        else:
            members = list(run.optimizer.ask())
            assert distance(members_together(run, members), members_alone(run, members)) < 1e-3
            found[kind] = "together"
        ids = run.engine.tokenize(DATA["prompt"][:])
        for prompt, theirs in zip(ids, own_completions(run.model, ids), strict=True):
            (mine,) = run.engine.generate([prompt], seed=0)
            assert mine.ids == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_runs_where_the_model_does(kind, tmp_path):
    model = build(kind)
    try:
        own_completions(build(kind).to(torch.bfloat16), [[5, 6, 7]])
    except Exception as error:  # the model's own
        pytest.skip(f"{kind} does not know bfloat16: {type(error).__name__}")
    run = make_trainer(model, tmp_path, bf16=True, max_steps=1)
    run.train()
    assert run.state.global_step == 1


def test_enough_architectures_were_compared():
    for kind, what in found.items():
        print(f"{kind}: {what}")
    together = [kind for kind, what in found.items() if what == "together"]
    assert len(found) >= ENOUGH, len(found)
    assert len(together) >= len(found) / 2, together
