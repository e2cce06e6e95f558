"""`model`, `quantization_config`, `peft_config` and `trust_remote_code`, as GRPOTrainer documents them."""

import json

import pytest
import torch
from conftest import logs, make_model, make_tokenizer
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import BitsAndBytesConfig


def adapter() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")


@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
@pytest.mark.parametrize("perturbation", ["gaussian", "low_rank"])
def test_an_adapter_of_a_quantized_model(trainer, tmp_path, options, perturbation):
    folder = str(tmp_path / "wide")  # enough for a block of the quantization
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    run = trainer(
        folder,
        quantization_config=BitsAndBytesConfig(**options),
        peft_config=adapter(),
        perturbation=perturbation,
        sigma=0.5,
    )
    assert run.model.base_model.model.model.layers[0].mlp.up_proj.weight.dtype in (torch.uint8, torch.int8)
    assert {name.split(".")[-3] for name in (shard.name for shard in run.optimizer.weights.shards)} == {
        "lora_A",
        "lora_B",
    }
    run.evaluate()  # the first time, 4-bit weights are packed for the CPU
    frozen = {name: p.clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    run.train()
    assert all(torch.equal(p, frozen[name]) for name, p in run.model.named_parameters() if name in frozen)
    assert logs(run)[-1]["distance_from_start"] > 0
    run.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    trained = {name for name, p in loaded.named_parameters() if "lora_B" in name and p.abs().sum() > 0}
    assert len(trained) == 4


def test_quantized_weights_without_an_adapter_are_refused_before_loading(trainer):
    for options in (
        {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
        {"model_init_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}},
    ):
        with pytest.raises(ValueError, match="`quantization_config` without `peft_config`"):
            trainer(model="no/such-model", **options)


def test_a_quantization_for_a_loaded_model_is_refused(trainer):
    with pytest.raises(ValueError, match="(?s)`quantization_config=.*` is for models given as a string"):
        trainer(make_model(), quantization_config=BitsAndBytesConfig(load_in_4bit=True), peft_config=adapter())


def test_two_quantizations_are_refused(trainer):
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="to the trainer and in `model_init_kwargs`"):
        trainer(quantization_config=quantization, model_init_kwargs={"quantization_config": quantization})


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path) -> str:
    """A model that is defined by code in its folder."""
    folder = tmp_path / "own"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "modeling_own.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_code_of_a_models_repository_runs_only_when_trusted(trainer, own_code):
    run = trainer(own_code, processing_class=None, trust_remote_code=True, max_steps=1)
    assert type(run.model).__name__ == "OwnModel"
    run.train()
    with pytest.raises(ValueError, match="trust_remote_code"):
        trainer(own_code, processing_class=None)
