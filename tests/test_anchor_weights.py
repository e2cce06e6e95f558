"""Where the initial weights are: on the device, in host memory, or in the files of the model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_same, make_model, weights
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from es_trainer import replay
from es_trainer.backends.initial_weights import InitialWeights
from es_trainer.weights.part import Part


ANCHORED = {"anchor_decay": 5.0, "learning_rate": 0.05}
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model in several files whose output layer is that of the input."""
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="20kB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": True},
        {"model_init_kwargs": {"dtype": "float16"}, "bf16": True, "master_weights": "none"},
    ],
    ids=["float32", "bfloat16", "rounded"],
)
def test_no_bit_depends_on_it(trainer, folder, tmp_path, penalty, options):
    found, checkpoints = {}, {}
    for place in ("device", "host", "model"):
        output = {"output_dir": str(tmp_path / place)}
        run = trainer(
            str(folder), **output, anchor_weights=place, anchor_penalty=penalty, **ANCHORED, **SAVED, **options
        )
        run.train()
        found[place] = weights(run.model)
        saved = FileSystemReader(tmp_path / place / "checkpoint-2" / "optimizer").read_metadata().state_dict_metadata
        checkpoints[place] = [key for key in saved if key.endswith("/anchor")]
    assert_same(found["host"], found["device"])
    assert_same(found["model"], found["device"])
    assert len(checkpoints["device"]) == len(checkpoints["host"]) == len(found["device"])
    assert not checkpoints["model"]
    free = trainer(str(folder), **{**ANCHORED, **SAVED, **options, "anchor_decay": 0.0})
    free.train()
    assert not torch.equal(weights(free.model)["model.norm.weight"], found["model"]["model.norm.weight"])


@pytest.mark.parametrize(("before", "after"), [("model", "model"), ("model", "device"), ("host", "model")])
def test_a_run_resumes_with_another_value(trainer, folder, tmp_path, before, after):
    whole = trainer(str(folder), output_dir=str(tmp_path / "whole"), **ANCHORED, **SAVED)
    whole.train()
    trainer(str(folder), anchor_weights=before, **ANCHORED, **{**SAVED, "max_steps": 2}).train()
    run = trainer(str(folder), anchor_weights=after, **ANCHORED, **SAVED)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 4
    assert_same(weights(run.model), weights(whole.model))
    rebuilt = replay(str(folder), tmp_path / "run")
    assert_same(weights(rebuilt), weights(whole.model))


def test_a_run_does_not_resume_with_another_model(trainer, folder, tmp_path):
    trainer(str(folder), anchor_weights="model", **ANCHORED, **SAVED).train()
    other = trainer(str(tmp_path / "run" / "checkpoint-2"), anchor_weights="model", **ANCHORED, **SAVED)
    with pytest.raises(ValueError, match="others than the run began with. Give the model that the run began with."):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_a_model_of_the_hub_is_found_in_its_cache(folder, tmp_path, monkeypatch):
    cached = tmp_path / "cache" / "models--some--model"
    shutil.copytree(folder, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    read = InitialWeights(make_model(), "some/model", {"cache_dir": str(tmp_path / "cache")})
    name, values = next(iter(make_model(dtype=torch.bfloat16).named_parameters()))
    assert torch.equal(read(Part.whole(name, values.shape), 3, 40), values.data.view(-1)[3:40])
    with pytest.raises(ValueError, match="'other/model' has no safetensors files"):
        InitialWeights(make_model(), "other/model", {"cache_dir": str(tmp_path / "cache")})


def anonymous_memory() -> int:
    """Bytes that this process has in memory and not in a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def test_files_are_not_copied_into_memory(tmp_path):
    size = 32 << 20
    save_file({"weight": torch.ones(size // 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    model = torch.nn.Linear(1, 1, bias=False)
    before = anonymous_memory()
    read = InitialWeights(model, str(tmp_path), {})
    part = Part.whole("weight", (size // 4,))
    assert sum(float(read(part, low, low + 4096).sum()) for low in range(0, size // 4, 4096)) == size // 4
    assert anonymous_memory() - before < size // 4


# ---- what cannot work ----


@pytest.mark.parametrize(
    "options",
    [
        {"model": make_model()},
        {"peft_config": LoraConfig(target_modules="all-linear")},
        {"save_only_model": True, "load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
        {"use_vllm": True, "vllm_mode": "server"},
    ],
    ids=["object", "adapter", "best", "servers"],
)
def test_what_it_does_not_go_with_is_refused(trainer, options):
    with pytest.raises(ValueError, match="`anchor_weights='model'` is not valid: .* (set it to 'host'|leave it out)"):
        trainer(anchor_weights="model", **ANCHORED, **options)


def rename(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    save_file({name.removeprefix("model."): t for name, t in load_file(file).items()}, file, {"format": "pt"})


def without_files(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [(rename, "have no `model.embed_tokens.weight` of shape"), (without_files, "has no safetensors files")],
)
def test_files_that_do_not_have_the_weights_are_refused(trainer, tmp_path, change, said):
    make_model().save_pretrained(tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(ValueError, match=f"`anchor_weights='model'` is not valid: .*{said}.*'host'"):
        trainer(str(tmp_path / "model"), anchor_weights="model", **ANCHORED)
    trainer(str(tmp_path / "model"), anchor_weights="host", **ANCHORED).train()


def test_files_that_are_changed_while_they_are_needed_are_refused(trainer, folder):
    run = trainer(str(folder), anchor_weights="model", **ANCHORED)
    make_model(seed=1, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="20kB")
    with pytest.raises(RuntimeError, match=r"model-.*safetensors was changed since the model was loaded"):
        run.train()


def test_the_history_does_not_say_it(trainer, folder, tmp_path):
    trainer(str(folder), anchor_weights="model", **ANCHORED).train()
    header = json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[0])
    assert "anchor_decay" in header["config"] and "anchor_weights" not in header["config"]
