import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file

from es_trainer import ESTrainer, replay


SCRIPT = Path(__file__).with_name("resume_run.py")


def run(*arguments) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], env=environment).returncode


def logs(folder: Path) -> list[dict]:
    """What was logged, without what the clock says."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    clock = ("seconds", "per_second", "runtime", "step_time")
    return [{key: value for key, value in log.items() if not key.endswith(clock)} for log in history]


def prompts(output: Path) -> dict[int, set[str]]:
    steps: dict[int, set[str]] = {}
    for line in Path(f"{output}.seen").read_text().splitlines():
        step, seen = json.loads(line)
        steps.setdefault(step, set()).add(json.dumps(seen))
    return steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder) -> dict[str, Path]:
    """The same run without a break, and killed in the middle of its seventh step and resumed."""
    folder = tmp_path_factory.mktemp("resume")
    whole, broken = folder / "whole", folder / "broken"
    assert run(model_folder, whole, -1) == 0
    assert run(model_folder, broken, 6) == -signal.SIGKILL
    assert sorted(path.name for path in broken.glob("checkpoint-*")) == ["checkpoint-4"]
    assert len((broken / "history.jsonl").read_text().splitlines()) == 1 + 6  # it was past the checkpoint
    assert run(model_folder, broken, -1, broken / "checkpoint-4") == 0
    return {"whole": whole, "broken": broken, "model": Path(model_folder)}


def test_weights_are_bit_identical_after_a_kill(runs):
    for name in ("final", "checkpoint-8"):
        mine, theirs = (load_file(runs[key] / name / "model.safetensors") for key in ("broken", "whole"))
        assert mine.keys() == theirs.keys()
        for key in theirs:
            assert torch.equal(mine[key], theirs[key]), key


def test_logs_are_bit_identical_after_a_kill(runs):
    whole = logs(runs["whole"] / "checkpoint-8")
    assert logs(runs["broken"] / "checkpoint-8") == whole
    assert [log["step"] for log in whole if "reward" in log] == [3, 6]
    assert all(log["eval_kl"] > 0 for log in whole if "eval_reward" in log)


def test_data_order_is_identical_after_a_kill(runs):
    assert prompts(runs["broken"]) == prompts(runs["whole"])
    assert len(prompts(runs["whole"])) == 9  # 8 steps, and evaluations after the last


def test_histories_are_identical_after_a_kill(runs):
    def updates(key: str) -> list[dict]:
        lines = (runs[key] / "history.jsonl").read_text().splitlines()[1:]
        return [{k: v for k, v in json.loads(line).items() if k != "metrics"} for line in lines]

    assert updates("broken") == updates("whole")
    rebuilt = replay(str(runs["model"]), runs["broken"])
    final = load_file(runs["whole"] / "final" / "model.safetensors")
    for name, parameter in rebuilt.named_parameters():
        assert torch.equal(parameter, final[name]), name


# ---- checkpoints that do not fit ----


@pytest.fixture
def trainer(model_folder, dataset, reward, config):
    def make(model=None, **options) -> ESTrainer:
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, **options}
        return ESTrainer(model or model_folder, reward, config(**options), dataset, processing_class=make_tokenizer())

    return make


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("sigma", 0.1, "`sigma` is 0.1 but was 0.05"),
        ("population_size", 6, "`population_size` is 6 but was 4"),
        ("learning_rate", 0.5, "`learning_rate` is 0.5 but was 0.02"),
        ("seed", 7, "`seed` is 7 but was 42"),
        ("es_optimizer", "adam", "`es_optimizer` is 'adam' but was 'sgd'"),
        ("temperature", 1.0, "`temperature` is 1.0 but was 0.0"),
        ("bf16", True, "`bf16` is True but was False"),
        ("perturbation", "low_rank", "`perturbation` is 'low_rank' but was 'gaussian'"),
        ("perturbation_rank", 2, "`perturbation_rank` is 2 but was 1"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(trainer, tmp_path, option, value, message):
    trainer().train()
    other = trainer(**{option: value})
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_model_is_refused(trainer, tmp_path):
    trainer().train()
    with pytest.raises(ValueError, match="checkpoint-2 is of another run: the trained parameter `model.layers.2"):
        trainer(make_model(num_hidden_layers=3)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "missing", ["optimizer/.metadata", "optimizer/state.json", "history.jsonl", "trainer_state.json"]
)
def test_an_incomplete_checkpoint_is_refused(trainer, tmp_path, missing):
    trainer().train()
    (tmp_path / "run" / "checkpoint-2" / missing).unlink()
    said = "complete optimizer/" if missing.startswith("optimizer") else missing
    with pytest.raises(ValueError, match=f"checkpoint-2 has no {said}"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_a_run_can_be_made_longer(trainer, tmp_path):
    trainer().train()
    longer = trainer(max_steps=4)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 4
    whole = trainer(max_steps=4)
    whole.train()
    assert torch.equal(longer.model.model.norm.weight, whole.model.model.norm.weight)


def test_a_run_can_go_on_in_another_folder(trainer, tmp_path):
    trainer().train()
    shutil.move(tmp_path / "run" / "checkpoint-1", tmp_path / "elsewhere")
    moved = trainer(output_dir=str(tmp_path / "other"))
    moved.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    lines = (tmp_path / "other" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[1:]] == [1, 2]


# ---- low-rank perturbations and population batches ----


def weights(run: ESTrainer) -> dict[str, torch.Tensor]:
    return {shard.name: shard.trained.clone() for shard in run.optimizer.weights.shards}


def updates(folder: Path) -> list[dict]:
    lines = (folder / "history.jsonl").read_text().splitlines()[1:]
    return [{k: v for k, v in json.loads(line).items() if k != "metrics"} for line in lines]


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("master_weights", ["device", "none"])
def test_a_low_rank_run_resumes_exactly_whatever_the_batch(trainer, tmp_path, master_weights, size):
    options = {
        "perturbation": "low_rank",
        "perturbation_rank": 2,
        "master_weights": master_weights,
        "bf16": True,
        "es_optimizer": "adam",
        "temperature": 1.0,
        "num_generations": 2,
        "max_steps": 4,
    }
    whole = trainer(**options)
    whole.train()
    resumed = trainer(output_dir=str(tmp_path / "resumed"), population_batch_size=size, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert updates(tmp_path / "resumed") == updates(tmp_path / "run")
    for name, values in weights(whole).items():
        assert torch.equal(weights(resumed)[name], values), name


def test_a_low_rank_run_of_another_rank_is_refused(trainer):
    trainer(perturbation="low_rank").train()
    with pytest.raises(ValueError, match="`perturbation_rank` is 2 but was 1"):
        trainer(perturbation="low_rank", perturbation_rank=2).train(resume_from_checkpoint=True)


def test_a_run_may_go_on_with_another_population_batch(trainer, model_folder, tmp_path):
    options = {"master_weights": "none", "bf16": True}
    trainer(population_batch_size=1, **options).train()
    longer = trainer(population_batch_size=2, max_steps=4, **options)
    longer.train(resume_from_checkpoint=True)
    assert [line["in_place"] for line in updates(tmp_path / "run")] == [True, True, False, False]
    rebuilt = replay(model_folder, tmp_path / "run")
    for name, values in weights(longer).items():
        assert torch.equal(rebuilt.get_parameter(name).flatten(), values.float()), name
