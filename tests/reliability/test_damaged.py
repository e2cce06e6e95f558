"""Checkpoints of which a file was cut or spoiled: refused by name, or passed over for an older one that is good."""

import shutil
from pathlib import Path

import pytest
from conftest import assert_same, letters, weights

from es_trainer import ESTrainer


SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "es_optimizer": "adam", "bf16": True}
FILES = {
    *("model.safetensors", "config.json", "generation_config.json", "training_args.bin", "trainer_state.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "scheduler.pt", "rng_state.pth"),
    *("history.jsonl", "checksums.json", "optimizer/.metadata", "optimizer/__0_0.distcp", "optimizer/state.json"),
}
TENTHS = range(0, 100, 10)


def cut(file: Path, percent: int) -> None:
    """Leave the file's beginning."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * percent // 100])


def spoil(file: Path, percent: int) -> None:
    """Flip a bit."""
    data = bytearray(file.read_bytes())
    data[len(data) * percent // 100] ^= 4
    file.write_bytes(data)


@pytest.fixture
def whole(trainer) -> ESTrainer:
    run = trainer(**SAVED)
    run.train()
    return run


def assert_refused(run: ESTrainer, checkpoint: Path, name: str) -> None:
    with pytest.raises(ValueError) as error:
        run.train(resume_from_checkpoint=str(checkpoint))
    assert Path(name).name in str(error.value) and checkpoint.name in str(error.value), error.value


def assert_each_is_refused(trainer, whole, tenths) -> None:
    checkpoint, run = Path(whole.args.output_dir) / "checkpoint-2", trainer(**SAVED, eval_dataset=None)
    assert {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()} == FILES
    for name in FILES:
        kept = (checkpoint / name).read_bytes()
        for damage in (cut, spoil):
            for percent in tenths:
                damage(checkpoint / name, percent)
                assert_refused(run, checkpoint, name)
                (checkpoint / name).write_bytes(kept)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(run.model), weights(whole.model))


def test_a_damaged_file_is_named(trainer, whole):
    assert_each_is_refused(trainer, whole, [60])


@pytest.mark.slow
def test_a_file_that_is_damaged_anywhere_is_named(trainer, whole):
    assert_each_is_refused(trainer, whole, TENTHS)


def assert_passed_over(trainer, whole, name: str, damage, percent: int, caplog) -> None:
    """With a damaged last checkpoint, the run goes on from the one before, and nothing is evaluated again."""
    seen = []

    def noted(completions, trainer_state, **kwargs):
        seen.append(trainer_state.global_step)
        return letters(completions)

    noted.__name__ = "letters"
    shutil.copytree(whole.args.output_dir, "damaged")
    damage(Path("damaged") / "checkpoint-3" / name, percent)
    caplog.clear()
    run = trainer(reward_funcs=noted, output_dir="damaged", **SAVED | {"max_steps": 4})
    run.train(resume_from_checkpoint=True)
    assert set(seen) == {3}  # the fourth step, which is new
    warnings = [record.message for record in caplog.records if "passes over checkpoint-3" in record.message]
    assert len(warnings) == 1 and Path(name).name in warnings[0]
    shutil.rmtree("damaged")
    return weights(run.model)


@pytest.fixture
def longer(trainer, tmp_path) -> dict:
    """The weights of four steps."""
    run = trainer(output_dir=str(tmp_path / "longer"), **SAVED | {"max_steps": 4})
    run.train()
    return weights(run.model)


def test_a_damaged_checkpoint_is_passed_over(trainer, whole, longer, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert_same(assert_passed_over(trainer, whole, "optimizer/__0_0.distcp", spoil, 50, caplog), longer)


@pytest.mark.slow
def test_checkpoints_damaged_anywhere_are_passed_over(trainer, whole, longer, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(sorted(FILES)):
        for damage in (cut, spoil):
            percent = 10 * (number % 10)
            assert_same(assert_passed_over(trainer, whole, name, damage, percent, caplog), longer)


def test_a_run_without_a_good_checkpoint_goes_on_from_its_history(trainer, whole, tmp_path, caplog):
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        spoil(checkpoint / "model.safetensors", 90)
    run = trainer(**SAVED)
    run.train(resume_from_checkpoint=True)
    assert_same(weights(run.model), weights(whole.model))
    assert sum("passes over" in record.message for record in caplog.records) == 3


def test_without_a_good_checkpoint_and_a_history_it_is_an_error(trainer, whole, tmp_path):
    (tmp_path / "run" / "history.jsonl").unlink()
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        cut(checkpoint / "scheduler.pt", 0)
    with pytest.raises(ValueError, match="The file scheduler.pt of the checkpoint .*checkpoint-1 is not what was"):
        trainer(**SAVED).train(resume_from_checkpoint=True)


def test_checkpoints_of_earlier_versions_have_no_checksums(trainer, whole, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / "checksums.json").unlink()
    run = trainer(**SAVED)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(run.model), weights(whole.model))
