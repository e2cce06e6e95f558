"""Tiny models that read images, and their processors, built without a hub."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, make_tokenizer
from datasets import Dataset
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)


TEXT = {key: value for key, value in TINY.items() if key not in ("vocab_size", "max_position_embeddings")}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)

Tiny = tuple[PreTrainedModel, ProcessorMixin]


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """Coloured squares of 8 pixels."""
    colours = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(8, axis=0).repeat(8, axis=1))


def image_processor(family: str, name: str, **options: Any) -> Any:
    """An image processor that computes with PIL and NumPy."""
    module = f"transformers.models.{family}.image_processing_pil_{family}"
    pytest.importorskip(module, reason="image processors of this version of Transformers need torchvision")
    return getattr(import_module(module), f"{name}ImageProcessorPil")(**options)


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with special tokens for images, of which some have names."""
    made = make_tokenizer(extra_special_tokens=named)
    made.add_special_tokens({"additional_special_tokens": special})
    return made


def without_video(kind: type[ProcessorMixin], **attributes: Any) -> type[ProcessorMixin]:
    """A processor's class without its video processor, which needs torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        for name, value in attributes.items():
            setattr(self, name, value)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return type(kind.__name__, (kind,), {"__init__": __init__})


def qwen(kind: type, config: type, processor: type, deepstack: dict[str, Any], **rope: Any) -> Tiny:
    tokens = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
    own = tokenizer(*tokens)
    start, image, end, video = ids = own.convert_tokens_to_ids(list(tokens))
    text = {**TEXT, "vocab_size": len(own), "max_position_embeddings": 256, "rope_parameters": rope, "head_dim": 8}
    vision = {
        **{"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "patch_size": 8},
        **{"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, **deepstack},
    }
    names = dict(
        zip(("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id"), ids, strict=True)
    )
    model = kind(config(text_config=text, vision_config=vision, tie_word_embeddings=False, **names))
    pictures = image_processor(
        "qwen2_vl", "Qwen2VL", patch_size=8, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    made = without_video(
        processor,
        image_token=tokens[1],
        image_token_id=image,
        video_token=tokens[3],
        video_token_id=video,
        vision_start_token=tokens[0],
        vision_start_token_id=start,
        vision_end_token=tokens[2],
        vision_end_token_id=end,
    )
    return model, made(pictures, own, CHAT_TEMPLATE.replace("IMAGE", tokens[0] + tokens[1] + tokens[2]))


def qwen2_5_vl() -> Tiny:
    vision = {"window_size": 32, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    return qwen(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, Qwen2_5_VLProcessor, vision, **rope)


def qwen3_vl() -> Tiny:
    vision = {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    return qwen(Qwen3VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLProcessor, vision, **rope)


def gemma3() -> Tiny:
    own = tokenizer(image_token="<img>", boi_token="<boi>", eoi_token="<eoi>")
    text = {**TEXT, "vocab_size": len(own), "max_position_embeddings": 256, "head_dim": 8}
    tokens = {"image_token_index": own.image_token_id, "boi_token_index": own.boi_token_id}
    config = Gemma3Config(
        text_config=text,
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        eoi_token_index=own.eoi_token_id,
        tie_word_embeddings=False,
        **tokens,
    )
    pictures = image_processor("gemma3", "Gemma3", size={"height": 32, "width": 32})
    template = CHAT_TEMPLATE.replace("IMAGE", "<boi>")
    return Gemma3ForConditionalGeneration(config), Gemma3Processor(pictures, own, template, image_seq_length=4)


def idefics3(**options: Any) -> Tiny:
    rows = [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
    own = tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *rows)
    text = {**TEXT, "vocab_size": len(own), "max_position_embeddings": 256, "model_type": "llama", **options}
    vision = {**VISION, "image_size": 32, "patch_size": 8}
    image = own.convert_tokens_to_ids("<image>")
    config = Idefics3Config(text_config=text, vision_config=vision, image_token_id=image, scale_factor=2)
    pictures = image_processor("idefics3", "Idefics3", size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = CHAT_TEMPLATE.replace("IMAGE", "<image>")
    processor = Idefics3Processor(pictures, own, image_seq_len=4, chat_template=template)
    return Idefics3ForConditionalGeneration(config), processor


def llava_next() -> Tiny:
    own = tokenizer(image_token="<image>")
    text = {**TEXT, "vocab_size": len(own), "max_position_embeddings": 256, "model_type": "llama"}
    vision = {**VISION, "image_size": 32, "patch_size": 8, "projection_dim": 32, "model_type": "clip_vision_model"}
    places = [[32, 64], [64, 32], [64, 64]]
    config = LlavaNextConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=own.image_token_id,
        image_grid_pinpoints=places,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    pictures = image_processor(
        "llava_next",
        "LlavaNext",
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=places,
    )
    processor = LlavaNextProcessor(
        pictures, own, 8, "default", CHAT_TEMPLATE.replace("IMAGE", "<image>"), num_additional_image_tokens=1
    )
    return LlavaNextForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[..., Tiny]] = {
    make.__name__: make for make in (qwen2_5_vl, qwen3_vl, gemma3, idefics3, llava_next)
}


def make_tiny(family: str, seed: int = 0, **options: Any) -> Tiny:
    """A model, whose text model may have options, and its processor."""
    torch.manual_seed(seed)
    model, processor = FAMILIES[family](**options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # So that answers depend on what is seen
            if parameter.dim() > 1 and not name.endswith("norm.weight"):
                parameter.normal_(std=0.3)
    return model.eval(), processor


def question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def with_pictures(number: int = 4, first: int = 0) -> Dataset:
    """Rows with a column `"image"`, of pictures of two sizes."""
    rows = [
        {"prompt": question(f"What is {i}?"), "image": picture(i, width=32 + 32 * (i % 2))}
        for i in range(first, first + number)
    ]
    return Dataset.from_list(rows)
