"""An adapter of PEFT's is trained, and vLLM has the base model."""

import pytest
import tiny
from conftest import assert_same, logs
from peft import LoraConfig
from safetensors.torch import load_file

from es_trainer import ESTrainer, replay


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
