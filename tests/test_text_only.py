"""Multimodal models that are trained on text."""

import pytest
import torch
from conftest import TINY, logs, make_tokenizer, weights
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForCausalLM,
    MllamaForConditionalGeneration,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from es_trainer.text_only import freeze_other_modalities


TEXT = {key: value for key, value in TINY.items() if key != "initializer_range"}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 32}


def gemma() -> Gemma3ForConditionalGeneration:
    tokens = {"image_token_index": 250, "boi_token_index": 251, "eoi_token_index": 252}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config={**TEXT, "head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4, **tokens)
    )


def llava() -> LlavaForConditionalGeneration:
    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
    text = {**TEXT, "model_type": "llama"}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=250))


def smolvlm() -> SmolVLMForConditionalGeneration:
    text = {**TEXT, "model_type": "llama"}
    return SmolVLMForConditionalGeneration(SmolVLMConfig(text_config=text, vision_config=VISION, image_token_id=250))


def qwen_audio() -> Qwen2AudioForConditionalGeneration:
    text = {**TEXT, "model_type": "qwen2"}
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(text_config=text, audio_config=AUDIO, audio_token_index=250)
    )


def mllama(kind: type = MllamaForConditionalGeneration) -> MllamaForConditionalGeneration | MllamaForCausalLM:
    text = {**TEXT, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {**VISION, "num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 64}
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=250)
    return kind(config.text_config if kind is MllamaForCausalLM else config)


def mllama_text() -> MllamaForCausalLM:
    return mllama(MllamaForCausalLM)


def phi() -> Phi4MultimodalForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    audio = {**sizes, "num_blocks": 1, "input_size": 8, "nemo_conv_channels": 8, "ext_pw_out_channel": 32}
    vision = {**VISION, "crop_size": 28}
    config = Phi4MultimodalConfig(**TEXT, vision_config=vision, audio_config=audio, partial_rotary_factor=1.0)
    return Phi4MultimodalForCausalLM(config)


def git() -> GitForCausalLM:
    text = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return GitForCausalLM(GitConfig(vision_config=VISION, num_attention_heads=4, **text))


@pytest.mark.parametrize("make", [gemma, llava, smolvlm, qwen_audio, mllama, mllama_text, phi])
def test_what_is_frozen_is_what_gets_no_gradient_from_a_text(make):
    model = make()
    model(input_ids=torch.arange(3, 30)[None]).logits.sum().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused
    freeze_other_modalities(model)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == unused


def test_a_tower_inside_of_the_decoder():
    model = git()
    freeze_other_modalities(model)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all("image_encoder" in name for name in frozen)


def test_a_tower_stays_as_it_was(trainer, tmp_path):
    folder = str(tmp_path / "gemma")
    gemma().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    run = trainer(folder, reward_funcs=lambda completions, **_: [float(sum(map(ord, c))) for c in completions])
    before = weights(run.model)
    run.train()
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert logs(run)[-1]["distance_from_start"] > 0
    assert changed and not any("vision" in name or "projector" in name for name in changed)


def test_an_adapter_in_a_tower():
    model = get_peft_model(gemma(), LoraConfig(r=2, target_modules="all-linear"))
    assert any("vision" in name for name, p in model.named_parameters() if p.requires_grad)
    freeze_other_modalities(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("language_model" in name or "lm_head" in name for name in trained)


def test_what_was_frozen_by_hand_stays_frozen():
    model = llava()
    head = model.get_output_embeddings().weight
    head.requires_grad = False
    freeze_other_modalities(model)
    assert not head.requires_grad
