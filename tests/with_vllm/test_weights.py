"""Every parameter is found in vLLM's own weights, perturbed, restored and updated there like in a plain model."""

import base64
import contextlib
import functools
import json

import pytest
import torch
from conftest import TINY, make_tokenizer
from tiny import start_llm
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from vllm import LLM
from vllm.model_executor.models.utils import WeightsMapper

from es_trainer import ESConfig
from es_trainer.engines.live_weights import find_unused_weights
from es_trainer.engines.vllm_engine import logprobs
from es_trainer.engines.vllm_weights import LoadError, check_values, find_engine_weights
from es_trainer.evolution import Member
from es_trainer.run.history import describe, make_optimizer, replay_step, run_config


SMALL = {**TINY, "head_dim": 32, "initializer_range": 0.1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "hidden_size": 64}
MODELS = {
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "untied": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "qwen2": Qwen2Config(**{**SMALL, "num_attention_heads": 1, "num_key_value_heads": 1}),
    "qwen3": Qwen3Config(**SMALL),
    "experts": Qwen3MoeConfig(**{**SMALL, **EXPERTS}),
    "mixtral": MixtralConfig(**{**SMALL, "hidden_size": 64}, num_local_experts=4),
    "gemma3": Gemma3TextConfig(**SMALL, query_pre_attn_scalar=32),
    "fused": Phi3Config(**{**SMALL, "hidden_size": 128, "head_dim": 32}),
}
ONE_HEAD = {**SMALL, "num_attention_heads": 1, "num_key_value_heads": 1}
PLAIN = {"vocab_size": 259, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
OTHERS = {
    "gemma": GemmaConfig(**SMALL),
    "gemma2": Gemma2Config(**SMALL, query_pre_attn_scalar=32),
    "olmo2": Olmo2Config(**ONE_HEAD),
    "granite": GraniteConfig(**ONE_HEAD),
    "cohere": CohereConfig(**ONE_HEAD),
    "smollm3": SmolLM3Config(**SMALL),
    "qwen2 with experts": Qwen2MoeConfig(
        **{**SMALL, **EXPERTS, "num_attention_heads": 2}, shared_expert_intermediate_size=32
    ),
    "gpt-neox": GPTNeoXConfig(**PLAIN, intermediate_size=64, max_position_embeddings=256),
    "phi": PhiConfig(**PLAIN, intermediate_size=64, max_position_embeddings=256),
    "opt": OPTConfig(**PLAIN, ffn_dim=64, word_embed_proj_dim=64, max_position_embeddings=256),
}
STEPS = [
    {"seeds": [7, 8], "signs": [1, -1], "utilities": [1.0, 0.5], "learning_rate": 0.05, "in_place": True},
    {"seeds": [9, 10], "signs": [1, 1], "utilities": [-0.5, 2.0], "learning_rate": 0.03, "in_place": True},
]


def save(config: PreTrainedConfig, folder) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def call(llm: LLM, method: str, *args) -> dict:
    (answer,) = llm.collective_rpc(method, args=args)
    assert "error" not in answer, answer["traceback"]
    return answer


def effects_missing(llm: LLM, names: list[str]) -> list[str]:
    @contextlib.contextmanager
    def overwritten(name):
        call(llm, "overwrite", name)
        yield
        call(llm, "undo_overwrite")

    return find_unused_weights(names, overwritten, functools.partial(logprobs, llm), make_tokenizer(), context=256)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in MODELS), *((name, "bfloat16") for name in ("tied", "biases", "experts"))],
)
def test_weights_are_those_of_a_plain_model(tmp_path, name, dtype):
    folder = save(MODELS[name], tmp_path / "model")
    llm = start_llm(folder, dtype)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    named = list(plain.named_parameters())
    shapes = {name: list(parameter.shape) for name, parameter in named}
    args = ESConfig(str(tmp_path), use_cpu=True, bf16=dtype == "bfloat16", es_optimizer="adam", weight_decay=0.1)
    optimizer = make_optimizer(named, {named[0][0]}, run_config(args))
    header = json.loads(json.dumps(describe(optimizer, args)))
    (engine_weights,) = llm.collective_rpc("engine_weights", args=(shapes,))

    def check():
        for name, parameter in named:
            assert torch.equal(engine_weights[name].weights, parameter.data.reshape(-1)), name

    assert call(llm, "load_check", shapes) == {"found": len(shapes)}
    assert effects_missing(llm, list(shapes)) == []
    first = call(llm, "begin", header, "float32")  # which would find that a weight is not what it was
    check()
    call(llm, "perturb", 5, -1, 0.1)
    optimizer.weights.perturb(Member(5, -1), 0.1)
    check()
    call(llm, "restore")
    optimizer.restore()
    check()
    for line in STEPS:
        call(llm, "perturb", 6, 1, 0.1)
        answer = call(llm, "update", line)
        replay_step(optimizer, line)
        check()
        assert answer["update_norm"] == optimizer.update_norm > 0
        assert answer["checksum"] == optimizer.weights.checksums() != first["checksum"]
    assert answer["updates"] == 2 and call(llm, "checksum")["digest"] == answer["digest"] != first["digest"]
    with optimizer.weights.in_checkpoint_dtype():
        for name, parameter in named:
            exported = call(llm, "export", name, 0, parameter.numel())
            data = bytearray(base64.b64decode(exported["data"]))
            assert torch.equal(torch.frombuffer(data, dtype=torch.float32), parameter.data.reshape(-1)), name
    assert call(llm, "begin", header, "float32")["updates"] == 2
    assert call(llm, "restart", header, "float32")["checksum"] == first["checksum"]


@pytest.mark.parametrize("name", ["tied", "experts", "fused"])
def test_a_perturbed_engine_answers_like_a_perturbed_model(tmp_path, name):
    from vllm import SamplingParams

    folder = save(MODELS[name], tmp_path / "model")
    llm = start_llm(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    named = list(plain.named_parameters())
    args = ESConfig(str(tmp_path), use_cpu=True, bf16=False)
    optimizer = make_optimizer(named, set(), run_config(args))
    call(llm, "begin", json.loads(json.dumps(describe(optimizer, args))), "float32")
    prompt = make_tokenizer()("Say one")["input_ids"]
    answers = set()
    for seed in (None, 1, 2):
        if seed is not None:
            call(llm, "perturb", seed, 1, 0.1)
            optimizer.weights.perturb(Member(seed, 1), 0.1)
        llm.reset_prefix_cache()
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        mine = plain.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert list(output.outputs[0].token_ids) == mine[0, len(prompt) :].tolist()
        answers.add(tuple(output.outputs[0].token_ids))
    assert len(answers) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_more_models_are_found(tmp_path, name):
    folder = save(OTHERS[name], tmp_path / "model")
    parameters = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    llm = start_llm(folder)  # after that: some models are Transformers' own in vLLM, which changes their classes
    (engine_weights,) = llm.collective_rpc(
        "engine_weights", args=({name: list(p.shape) for name, p in parameters.items()},)
    )
    check_values(engine_weights, parameters)
    call(llm, "load_check", {name: list(p.shape) for name, p in parameters.items()})
    assert effects_missing(llm, list(parameters)) == []
    for name, own in engine_weights.items():
        assert torch.equal(own.part.of(parameters[name].data), own.weights), name


class Fused(nn.Linear):
    """A linear layer as vLLM has it for several projections."""

    def __init__(self, *sizes: int):
        super().__init__(8, sum(sizes))
        self.output_partition_sizes = list(sizes)


def as_vllm(packed: dict[str, list[str]], prefixes: dict[str, str], layers: dict[str, nn.Module]) -> nn.Module:
    """A model with layers under the names that vLLM has for them."""
    model = nn.Module()
    model.packed_modules_mapping, model.hf_to_vllm_mapper = packed, WeightsMapper(orig_to_new_prefix=prefixes)
    for name, layer in layers.items():
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name.rpartition(".")[2], layer)
    return model


PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
TEXT_PREFIX = {"model.language_model.": "language_model.model."}


def test_names_of_models_like_qwen_vl():
    """Of which one layer is fused in Transformers already, and the others are both renamed and fused."""
    qkv, own, mlp = Fused(8, 4, 4), Fused(8, 8, 8), Fused(16, 16)
    layers = {"language_model.model.layers.0.qkv_proj": qkv, "visual.attn.qkv": own, "visual.mlp.gate_up_proj": mlp}
    engine = as_vllm(PACKED | {"qkv": ["qkv"]}, TEXT_PREFIX | {"model.visual.": "visual."}, layers)
    text = "model.language_model.layers.0"
    slices = {
        f"{text}.q_proj": (qkv, slice(8)),
        f"{text}.k_proj": (qkv, slice(8, 12)),
        f"{text}.v_proj": (qkv, slice(12, 16)),
        "model.visual.attn.qkv": (own, slice(24)),
        "model.visual.mlp.gate_proj": (mlp, slice(16)),
        "model.visual.mlp.up_proj": (mlp, slice(16, 32)),
    }
    values = {f"{name}.weight": layer.weight.data[rows] for name, (layer, rows) in slices.items()}
    values |= {f"{name}.bias": layer.bias.data[rows] for name, (layer, rows) in slices.items()}
    found = find_engine_weights(engine, {name: tensor.shape for name, tensor in values.items()})
    check_values(found, values)


def test_names_of_models_like_gemma3_whose_tower_has_a_head_that_vllm_leaves_out():
    layers = {
        "vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj": Fused(8, 8, 8),
        "vision_tower.vision_model.encoder.layers.0.fc1": nn.Linear(8, 8),
    }
    engine = as_vllm(PACKED, TEXT_PREFIX | {"model.vision_tower.": "vision_tower."}, layers)
    tower = "model.vision_tower.encoder.layers.0"
    projections = [f"{tower}.self_attn.{part}_proj" for part in "qkv"] + [f"{tower}.fc1"]
    shapes = {f"{name}.{kind}": size for name in projections for kind, size in (("weight", (8, 8)), ("bias", (8,)))}
    shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
    head = {"model.vision_tower.head.probe": torch.Size([1, 1, 8])}
    found = find_engine_weights(engine, shapes | head, dispensable=head)
    assert found.keys() == shapes.keys()
    with pytest.raises(LoadError, match="model.vision_tower.head.probe is missing"):
        find_engine_weights(engine, shapes | head)


def test_weights_that_lie_otherwise_are_refused(tmp_path):
    config = GPT2Config(n_embd=64, n_head=2, n_layer=1, vocab_size=259, n_positions=256)
    llm = start_llm(save(config, tmp_path / "model"))
    shapes = {
        name: list(parameter.shape) for name, parameter in AutoModelForCausalLM.from_config(config).named_parameters()
    }
    (answer,) = llm.collective_rpc("load_check", args=(shapes,))
    assert "LoadError" in answer["error"] and "c_attn.weight has shape [64, 192]" in answer["error"]


def test_what_is_missing_is_named(tmp_path):
    llm = start_llm(save(MODELS["tied"], tmp_path / "model"))
    model = AutoModelForCausalLM.from_config(MODELS["tied"])
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    (answer,) = llm.collective_rpc("load_check", args=({**shapes, "model.extra.weight": [3]},))
    assert "model.extra.weight is missing" in answer["error"]
    shapes.pop("model.layers.0.self_attn.k_proj.weight")
    (answer,) = llm.collective_rpc("load_check", args=(shapes,))
    assert "belong to no parameter" in answer["error"] and "layers.0.self_attn.qkv_proj.weight" in answer["error"]


def test_packed_weights_are_found_out(tmp_path, monkeypatch):
    from vllm.model_executor.layers import utils

    def pack(layer, remove_weight):
        packed = layer.weight.data.clone()
        layer.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, packed, bias)
        layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", pack)
    llm = start_llm(save(MODELS["untied"], tmp_path / "model"))
    model = AutoModelForCausalLM.from_config(MODELS["untied"])
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    (answer,) = llm.collective_rpc("load_check", args=(shapes,))
    assert "LoadError" in answer["error"] and "q_proj.weight has shape" in answer["error"]
