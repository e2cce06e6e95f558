"""Members are written into vLLM's adapter slots as vLLM would load them from files."""

import json

import pytest
import torch
from safetensors.torch import save_file
from test_weights import MODELS, save
from tiny import start_llm, tiny_folder
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from es_trainer.engines.vllm_slots import LowRankMembers, slot_request
from es_trainer.engines.vllm_weights import LoadError
from es_trainer.evolution import Member
from es_trainer.noise.shapes import LowRank
from es_trainer.run.member_adapters import WEIGHTS_NAME, of_linear
from es_trainer.weights.store import Weights


LORA = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 8, "kv_cache_memory_bytes": 1 << 26}
RANK = 2
MEMBERS = [Member(5, -1), Member(6, 1)]


def in_slots(model) -> dict[str, list[torch.Tensor]]:
    """All that vLLM's layers have of adapters."""
    found = {}
    for name, layer in model.lora_manager.modules.items():
        for kind in ("lora_a_stacked", "lora_b_stacked"):
            stacked = getattr(layer, kind)
            found[f"{name}.{kind}"] = [t.clone() for t in (stacked if isinstance(stacked, tuple) else (stacked,))]
    return found


def write_files(weights: Weights, names, member: Member, folder) -> str:
    tensors = {}
    for shard in weights.shards:
        if shard.name in names:
            tensors |= of_linear(shard.name.removesuffix(".weight"), weights.of_members(shard, [member], 0.1), 0)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_NAME)
    modules = sorted({name.split(".")[-2] for name in names})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "dtype", "count"),
    [("tied", "float32", 14), ("biases", "bfloat16", 14), ("qwen3", "float32", 14), ("fused", "float32", 8)],
)
def test_members_are_what_vllm_would_load(tmp_path, name, dtype, count):
    folder = save(MODELS[name], tmp_path / "model")
    llm = start_llm(folder, dtype, **LORA)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = Weights(plain.named_parameters(), getattr(torch, dtype), perturbation=LowRank(RANK))
    (slots,) = llm.collective_rpc("slots", args=({name: list(p.shape) for name, p in plain.named_parameters()},))
    assert len(slots) == count
    (zeros,) = llm.apply_model(in_slots)
    weights.shards = [shard for shard in weights.shards if shard.name in slots]
    LowRankMembers(weights, slots).write(MEMBERS, 0.1)
    (mine,) = llm.apply_model(in_slots)
    llm.apply_model(lambda model: model.lora_manager.remove_all_adapters())
    for number, member in enumerate(MEMBERS, 1):
        path = write_files(weights, slots, member, tmp_path / str(number))
        llm.llm_engine.add_lora(LoRARequest(str(number), number, path))
    (loaded,) = llm.apply_model(in_slots)
    for layer, tensors in loaded.items():
        for written, other, zero in zip(mine[layer], tensors, zeros[layer], strict=True):
            assert torch.equal(written, other), layer
            assert not zero.any(), layer
    assert all(tensors[0].any() for layer, tensors in mine.items() if "_proj" in layer)


def test_rows_without_an_adapter_are_the_models_own(tmp_path):
    folder = save(MODELS["tied"], tmp_path / "model")
    llm = start_llm(folder, **LORA)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = Weights(plain.named_parameters(), perturbation=LowRank(RANK))
    (slots,) = llm.collective_rpc("slots", args=({name: list(p.shape) for name, p in plain.named_parameters()},))
    weights.shards = [shard for shard in weights.shards if shard.name in slots]
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=1, detokenize=False)

    def answers(salt: str, adapters: list[LoRARequest | None]) -> list[list[float]]:
        prompts = [{"prompt_token_ids": [5, 6, 7, 8], "cache_salt": salt} for _ in adapters]
        outputs = llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        return [[best.logprob for token in o.outputs[0].logprobs for best in token.values()] for o in outputs]

    (before,) = answers("before", [None])
    LowRankMembers(weights, slots).write(MEMBERS, 0.5)
    first, own, second = answers("together", [slot_request(0), None, slot_request(1)])
    (alone,) = answers("alone", [None])
    assert own == pytest.approx(before, abs=1e-5) and alone == pytest.approx(before, abs=1e-5)
    assert first != pytest.approx(before, abs=1e-2) and second != pytest.approx(before, abs=1e-2)


def compute_without_slots(model) -> None:
    """Break a layer: it does not compute with its slots from now on."""
    model.get_submodule("model.layers.0.mlp.down_proj")._apply_lora_to_output = lambda x, output: output


def test_slots_that_are_not_computed_with(trainer):
    run = trainer(tiny_folder(), use_vllm=True, vllm_lora=True, perturbation="low_rank")
    run.engine.llm.apply_model(compute_without_slots)
    with pytest.raises(LoadError, match="of adapters, a change of model.layers.0.mlp.down_proj.weight has no effect"):
        run.engine.slots()
