"""An adapter of PEFT's is trained, and vLLM has the base model."""

import time
from pathlib import Path

import pytest
import tiny
import torch
from compressed_tensors.compressors import pack_to_int32
from conftest import assert_same, logs, make_model, make_tokenizer
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from es_trainer import ESTrainer, replay
from es_trainer.engines.vllm_engine import logprobs
from es_trainer.engines.vllm_weights import LoadError


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter(**options) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 12, "target_modules": ALL, **options}
    return LoraConfig(task_type="CAUSAL_LM", **options)


@pytest.fixture
def start(trainer):
    """Make an ESTrainer for a tiny run of an adapter, with vLLM or without."""

    def make(use_vllm=True, **options) -> ESTrainer:
        return trainer(**{"model": tiny.tiny_folder(), "use_vllm": use_vllm, "peft_config": adapter(), **options})

    return make


def saved(trainer: ESTrainer, folder):
    trainer.save_model(str(folder))
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("options", "lora"),
    [
        ({"perturbation": "gaussian", "evaluate_center": True, "eval_strategy": "steps", "eval_steps": 3}, {}),
        (
            {"perturbation": "low_rank", "population_batch_size": 3},
            {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2}},
        ),
    ],
)
def test_three_steps_are_those_of_transformers(start, tmp_path, options, lora):
    mine, theirs = (start(use, peft_config=adapter(**lora), sigma=0.1, **options) for use in (True, False))
    assert all(parameter.is_meta for name, parameter in mine.model.named_parameters() if "lora_" not in name)
    before = saved(mine, tmp_path / "before")
    assert_same(before, saved(theirs, tmp_path / "theirs before"))
    mine.train()
    theirs.train()
    for one, other in zip(logs(mine), logs(theirs), strict=True):
        for key in ("reward", "reward_std", "update_norm", "distance_from_start", "completions/mean_length"):
            assert one[key] == other[key], key
    assert len({log["reward_std"] for log in logs(mine)} - {0.0}) == 3
    assert mine.evaluate()["eval_reward"] == theirs.evaluate()["eval_reward"]
    after = saved(mine, tmp_path / "saved")
    assert_same(after, saved(theirs, tmp_path / "theirs"))
    assert all(not after[name].equal(before[name]) for name in before)
    replayed = replay(tiny.tiny_folder(), mine.args.output_dir)
    replayed.save_pretrained(tmp_path / "replayed")
    assert_same(load_file(tmp_path / "replayed" / "adapter_model.safetensors"), after)


def test_a_resumed_run_ends_with_the_same_adapter(start, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "learning_rate": 1.0}
    whole, theirs = (start(use, **options, output_dir=str(tmp_path / str(use))) for use in (True, False))
    whole.train()
    theirs.train()
    assert whole.state.best_global_step == theirs.state.best_global_step < 4
    resumed = start(**options, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    runs = {"whole": whole, "theirs": theirs, "resumed": resumed}
    found = {name: saved(run, tmp_path / "saved" / name) for name, run in runs.items()}
    assert_same(found["whole"], found["theirs"])
    assert_same(found["resumed"], found["theirs"])


def quantize(folder: Path) -> tuple[str, str]:
    """A model with weights of 4 bits, as vLLM loads it, and one with the values that these stand for."""
    model = make_model(**tiny.HEADS)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name in [name for name in tensors if "proj" in name]:
        weight = tensors.pop(name)
        scale = weight.abs().amax(dim=1, keepdim=True) / 7
        rounded = (weight / scale).round().clamp(-8, 7)
        model.get_parameter(name).data = rounded * scale
        tensors[f"{name}_packed"] = pack_to_int32(rounded.to(torch.int8), 4)
        tensors[f"{name}_scale"] = scale
        tensors[f"{name}_shape"] = torch.tensor(weight.shape)
    model.save_pretrained(folder / "values")
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    model.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    model.config.save_pretrained(folder / "quantized")
    save_file(tensors, folder / "quantized" / "model.safetensors", metadata={"format": "pt"})
    for kind in ("quantized", "values"):
        make_tokenizer().save_pretrained(folder / kind)
    return str(folder / "quantized"), str(folder / "values")


def test_an_adapter_of_a_quantized_model(start, tmp_path):
    quantized, values = quantize(tmp_path)
    run = start(model=quantized, fp16=True, sigma=0.3, learning_rate=0.3)

    def base():
        (tensors,) = run.engine.llm.apply_model(lambda model: {n: p.clone() for n, p in model.named_parameters()})
        return tensors

    before = base()
    assert sum(tensor.dtype == torch.int32 for tensor in before.values()) == 8
    ids = run.engine.tokenize(["Say one two three"])[0]
    mine = [probability(run, ids)]
    run.train()
    assert len({log["reward_std"] for log in logs(run)} - {0.0}) == 3
    assert_same(base(), before)
    mine.append(probability(run, ids))
    run.save_model(str(tmp_path / "adapter"))
    plain = AutoModelForCausalLM.from_pretrained(values, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    with torch.no_grad(), plain.disable_adapter():
        theirs = [highest(plain(torch.tensor([ids])).logits)]
    with torch.no_grad():
        theirs.append(highest(plain(torch.tensor([ids])).logits))
    assert mine == pytest.approx(theirs, abs=0.01)  # of float16
    assert abs(theirs[1] - theirs[0]) > 0.2


def highest(logits: torch.Tensor) -> float:
    return logits[0, -1].log_softmax(-1).max().item()


def probability(run: ESTrainer, ids: list[int]) -> float:
    """The highest log probability of the token after a prompt, with the unperturbed adapter."""
    return logprobs(run.engine.llm, ids, 1, str(time.time()), run.engine.unperturbed())[0]


def test_modules_without_slots_are_named(start):
    with pytest.raises(ValueError, match="adds one to `model.embed_tokens`, which is none"):
        start(peft_config=adapter(target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(LoadError, match="no adapters for 1 of the 3 modules of `peft_config`: lm_head[.]"):
        start(peft_config=adapter(target_modules=["q_proj", "lm_head"]))
