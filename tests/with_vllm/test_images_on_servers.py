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

    def start(use_vllm=True, model=None, processing_class=None, **options) -> ESTrainer:
        data = with_pictures()
        options |= {"train_dataset": data, "eval_dataset": data, "processing_class": processing_class}
        if use_vllm:
            options |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": [server.url]}
            return trainer(folder(), **options)
        model, processor = make()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "text_model" in name or "lm_head" in name
        options["processing_class"] = processor
        return trainer(model, population_batch_size=1, **options)

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
