"""Frozen parameters, buffers and quantized modules of a model that is computed with in bfloat16 or float16."""

import pytest
import torch
from conftest import assert_same, make_model, weights
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    GptOssConfig,
    LlamaConfig,
    MiniMaxConfig,
    OpenAIGPTConfig,
    PreTrainedModel,
    XGLMConfig,
)

from es_trainer import replay
from es_trainer.evolution import EvolutionStrategy
from es_trainer.precision import frozen_tensors, kept_in_float32


SMALL = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "minimax": MiniMaxConfig(
        **SMALL,
        **HEADS,
        head_dim=8,
        num_local_experts=2,
        layer_types=["linear_attention", "full_attention"],
        block_size=16,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "xglm": XGLMConfig(vocab_size=259, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    "ernie": Ernie4_5_MoeConfig(
        **SMALL,
        **HEADS,
        moe_intermediate_size=16,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "gpt-oss": GptOssConfig(**SMALL, **HEADS, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "openai-gpt": OpenAIGPTConfig(vocab_size=259, n_embd=32, n_layer=2, n_head=4),
}


def make(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32).eval()


def strategy(model: nn.Module, dtype: torch.dtype) -> EvolutionStrategy:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    float32 = kept_in_float32(model, dtype)
    return EvolutionStrategy(named, dtype=dtype, frozen=frozen_tensors(model, dtype), float32=float32)


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: buffer.dtype for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_buffers_are_those_of_a_model_loaded_in_that_dtype(tmp_path, kind, dtype):
    model = make(kind)
    model.save_pretrained(tmp_path)
    given = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = strategy(model, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert dtypes(model) == dtypes(loaded)
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, loaded(ids).logits, rtol=0, atol=2e-2)
    with optimizer.weights.in_checkpoint_dtype():
        assert all(torch.equal(buffer, given[name]) for name, buffer in model.named_buffers())
        assert dtypes(model) == {name: buffer.dtype for name, buffer in given.items()}
    assert dtypes(model) == dtypes(loaded)


def test_rotary_frequencies_stay_float32_under_an_adapter():
    model = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    strategy(model, torch.bfloat16)
    assert set(dtypes(model).values()) == {torch.float32}


def test_what_a_class_keeps_in_float32_stays():
    config = DeepseekV3Config(
        **SMALL,
        **{**HEADS, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    strategy(model, torch.bfloat16)
    found = dtypes(model)
    assert {found[name] for name in found if "e_score_correction_bias" in name} == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "dtype", "kept"),
    [("ernie", torch.bfloat16, "mlp.gate.weight"), ("gpt-oss", torch.float16, "norm.weight")],
)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_parameters_that_a_class_keeps_in_float32_stay(tmp_path, kind, dtype, kept, trained, given):
    model = make(kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    model.requires_grad_(trained).get_input_embeddings().requires_grad_(True)
    if trained:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(given)
        loaded.load_state_dict(model.state_dict())
    optimizer = strategy(model, dtype)
    wanted = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert {dtype for name, dtype in wanted.items() if name.endswith(kept)} == {torch.float32}
    ids = torch.arange(3, 15).view(2, 6)
    for _ in range(2):
        assert {name: parameter.dtype for name, parameter in model.named_parameters()} == wanted
        with torch.no_grad():
            assert torch.equal(model(ids).logits, loaded(ids).logits)
        optimizer.weights.to_checkpoint_dtype()
        assert not trained or {parameter.dtype for parameter in model.parameters()} == {given}
        optimizer.weights.to_working_dtype()
        optimizer.perturb(optimizer.ask().members[0])
        optimizer.restore()


def test_a_run_of_a_model_that_keeps_parameters_in_float32_is_replayed(trainer, tmp_path):
    for master_weights in ("device", "none"):
        run = trainer(make("ernie"), bf16=True, master_weights=master_weights)
        run.train()
        assert_same(weights(replay(make("ernie"), tmp_path / "run")), weights(run.model))


# ---- quantized modules ----


class Float8Linear(nn.Linear):
    """Float8 weights with a scale for each row."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.data.abs().amax(1, keepdim=True) / 448
        self.weight = nn.Parameter((linear.weight.data / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.weight.float() * self.weight_scale).to(x.dtype))


def quantize(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        for name in ("up_proj", "gate_proj", "down_proj"):
            setattr(layer.mlp, name, Float8Linear(getattr(layer.mlp, name)))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 15).view(2, 6)).logits.float()


def test_quantized_weights_under_an_adapter_stay_as_they_are():
    exact = make_model()
    expected = logits(exact)
    model = get_peft_model(quantize(make_model()), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    before = {name: p.clone() for name, p in model.named_parameters() if ".mlp." in name and not p.requires_grad}
    quantized = logits(model)
    assert (quantized - expected).std() < 0.1 * expected.std()
    optimizer = strategy(model, torch.bfloat16)
    assert (logits(model) - quantized).std() < 0.02 * expected.std()
    norm = model.get_base_model().model.norm.weight
    assert norm.dtype == torch.bfloat16  # which is not quantized
    for perturbed in (optimizer.ask().members[0], None):
        if perturbed is not None:
            optimizer.perturb(perturbed)
        for name, parameter in model.named_parameters():
            if name in before:
                assert parameter.dtype == before[name].dtype, name
                assert torch.equal(parameter.view(torch.uint8), before[name].view(torch.uint8)), name


def test_quantized_weights_are_not_trained():
    model = quantize(make_model())
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.requires_grad = True
    with pytest.raises(ValueError, match=r"`model.layers.0.mlp.up_proj.weight` is of torch.float8_e4m3fn.*adapter"):
        EvolutionStrategy([(n, p) for n, p in model.named_parameters() if p.requires_grad], dtype=torch.bfloat16)


def test_a_quantized_model_without_an_adapter_is_refused(trainer):
    with pytest.raises(ValueError, match=r"quantized \(`model.layers.0.mlp.gate_proj`\).*`peft_config`"):
        trainer(quantize(make_model()))


def test_an_adapter_of_a_float8_model_is_trained(trainer):
    adapter = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    run = trainer(quantize(make_model()), peft_config=adapter, bf16=True, max_steps=1)
    run.train()
    assert run.state.log_history[0]["distance_from_start"] > 0
    assert run.model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.float8_e4m3fn
