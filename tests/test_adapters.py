"""Adapters that a run makes."""

import torch
from conftest import assert_same, make_model, weights
from peft import LoraConfig

from es_trainer.adapters import add_adapter


def test_an_adapter_is_the_same_without_weights_of_the_base_model():
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    with torch.device("meta"):
        empty = make_model()
    mine, theirs = add_adapter(empty.to(torch.bfloat16), config, seed=7), add_adapter(make_model(), config, seed=7)
    found = {name: parameter for name, parameter in mine.named_parameters() if "lora_" in name}
    assert_same(found, {name: tensor for name, tensor in weights(theirs).items() if "lora_" in name})
    assert all(parameter.is_meta != (name in found) for name, parameter in mine.named_parameters())
    assert {name for name, parameter in mine.named_parameters() if parameter.requires_grad} == found.keys()
    assert mine.get_input_embeddings().weight is mine.get_output_embeddings().weight
