"""Training with images on a vLLM server."""

import pytest
import torch
from conftest import assert_same, logs, weights
from test_servers import Process
from tiny_pictures import answers, folder, make
from tiny_vision import picture, question, with_pictures
from transformers import AutoModelForImageTextToText

from es_trainer import ESTrainer


@pytest.fixture(scope="module")
def server():
    started = Process(model=folder())
    try:
        started.wait()
        yield started
    finally:
        started.kill()


@pytest.fixture
def see(trainer, server):
    """Make an ESTrainer that trains a tiny model on pictures, on the server or not."""

    def start(use_vllm=True, processing_class=None, frozen=(), **options) -> ESTrainer:
        data = with_pictures()
        options |= {"train_dataset": data, "eval_dataset": data, "processing_class": processing_class}
        if use_vllm:
            mode = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": [server.url]}
            return trainer(folder(), **mode | options)
        model, processor = make()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ("text_model" in name or "lm_head" in name) and name not in frozen
        options["processing_class"] = processor
        return trainer(model, **options)

    return start


def test_three_steps_are_those_of_transformers(see, caplog, tmp_path):
    mine, theirs = see(), see(False)
    assert "`model.vision_model, model.connector` stay as they are, because servers keep what they make" in caplog.text
    trained = [{name for name, p in run.model.named_parameters() if p.requires_grad} for run in (mine, theirs)]
    assert trained[0] == trained[1]
    for run in (mine, theirs):
        run.train()
    for one, other in zip(logs(mine), logs(theirs), strict=True):
        for key in ("reward", "reward_std", "num_tokens"):
            assert one[key] == other[key], key
    assert len({log["reward"] for log in logs(mine)}) == 3
    mine.save_model(str(tmp_path / "saved"))
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_same(weights(saved), weights(theirs.model))
    assert not torch.equal(weights(saved)["lm_head.weight"], make()[0].lm_head.weight)


def test_members_as_adapters(see):
    options = {"perturbation": "low_rank", "sigma": 0.2}
    server = Process("--enable-lora", "--max-loras", "3", "--max-lora-rank", "8", model=folder())
    try:
        server.wait()
        mine = see(vllm_lora=True, vllm_server_base_url=[server.url], **options)
        frozen = {name for name, p in mine.model.named_parameters() if not p.requires_grad}
        mine.train()
    finally:
        server.kill()
    theirs = see(False, frozen=frozen, **options)
    assert all("proj" in name for name, p in theirs.model.named_parameters() if p.requires_grad)
    theirs.train()
    for one, other in zip(logs(mine), logs(theirs), strict=True):
        for key in ("reward", "reward_std", "num_tokens"):
            assert one[key] == other[key], key
    assert len({log["reward_std"] for log in logs(mine)} - {0.0}) == 3


def test_rows_with_one_image_with_several_and_without(see):
    images = [[picture(0)], [], None, [picture(1), picture(2, width=64)], [picture(3).convert("CMYK")]]
    rows = [{"prompt": question(f"What is {i}?"), "images": some} for i, some in enumerate(images)]
    expected = answers(see(False), rows)
    assert len(set(map(tuple, expected))) == len(rows)
    assert answers(see(), rows) == expected


def test_another_processor_than_the_servers_is_refused(see):
    _, processor = make()
    processor.image_processor.size = {"longest_edge": 32}
    with pytest.raises(ValueError, match="`processing_class` is another processor than that of the model's files"):
        see(processing_class=processor)
