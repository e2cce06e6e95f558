"""Disks that are full or cannot be written to, folders with two runs, and clocks that go back."""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import assert_same, history, letters, weights
from test_kill import run_all

from es_trainer import replay


# With a line of the history that is longer than what is left of the file's last page
SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "es_optimizer": "adam", "population_size": 128}
SAVED |= {"perturbation": "low_rank", "max_completion_length": 2}
AS_ROOT = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of its own, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = f"size=8m,uid={os.geteuid()}"
    subprocess.run([*AS_ROOT, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run([*AS_ROOT, "umount", str(folder)], check=True)


def mounted_anew(folder: Path, options: str) -> None:
    subprocess.run([*AS_ROOT, "mount", "-o", f"remount,{options}", str(folder)], check=True)


@contextlib.contextmanager
def full(folder: Path, free: int) -> Iterator[None]:
    """Inside, the disk has little left."""
    status = os.statvfs(folder)
    filler = folder / "filler"
    filler.write_bytes(bytes(status.f_bavail * status.f_frsize - free))
    try:
        yield
    finally:
        filler.unlink(missing_ok=True)


def at_step(step: int, do: Callable[[], None]) -> Callable[..., list[float]]:
    """A reward function that does something in a step, once."""
    todo = [do]

    def reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step + 1 == step and todo:
            todo.pop()()
        return letters(completions)

    reward.__name__ = "letters"
    return reward


def whole(trainer, tmp_path):
    run = trainer(output_dir=str(tmp_path / "whole"), **SAVED)
    run.train()
    return weights(run.model)


@pytest.mark.parametrize(
    ("free", "note"),
    [
        (0, "history.jsonl could not be written. The updates that it had are still there"),
        pytest.param(64 * 1024, "checkpoint-3 could not be saved. No update is lost", marks=pytest.mark.slow),
        (200 * 1024, "checkpoint-3 could not be saved. No update is lost"),
    ],
)
def test_a_disk_that_is_full(trainer, disk, tmp_path, model_folder, free, note):
    output = str(disk / "run")
    with contextlib.ExitStack() as stack:
        reward = at_step(3, lambda: stack.enter_context(full(disk, free)))
        with pytest.raises(Exception) as error:
            trainer(reward_funcs=reward, output_dir=output, **SAVED).train()
        assert any(note in line for line in error.value.__notes__), error.value
        assert "resume_from_checkpoint=True" in error.value.__notes__[-1]
        # What else the error says is torch's: "unexpected pos 704 vs 598" where a file could not be written
        assert free == 0 or " MiB are free there" in error.value.__notes__[-1]
    seen = []
    reward = at_step(3, lambda: seen.append(3))
    again = trainer(reward_funcs=reward, output_dir=output, **SAVED)
    again.train(resume_from_checkpoint=True)
    assert_same(weights(again.model), whole(trainer, tmp_path))
    assert bool(seen) == (free == 0)  # no member is evaluated again whose update was recorded
    assert [line["step"] for line in history(output)] == [1, 2, 3]
    assert_same(weights(replay(model_folder, output)), weights(again.model))


def test_a_disk_that_is_full_at_the_first_update(trainer, disk):
    with contextlib.ExitStack() as stack:
        reward = at_step(1, lambda: stack.enter_context(full(disk, 0)))
        with pytest.raises(OSError) as error:
            trainer(reward_funcs=reward, output_dir=str(disk / "run"), **SAVED).train()
        assert error.value.errno == errno.ENOSPC
        assert any("could not be written" in note for note in error.value.__notes__)


def test_a_folder_that_cannot_be_written_to(trainer, disk):
    (disk / "run").mkdir()
    run = trainer(output_dir=str(disk / "run"), **SAVED)
    mounted_anew(disk, "ro")
    with pytest.raises(OSError, match="Read-only file system") as error:
        run.train()
    assert error.value.__notes__ == [
        f"`output_dir='{disk / 'run'}'` cannot be written to, so nothing was trained. Choose another."
    ]


def test_a_second_run_in_the_same_folder_is_refused(trainer, tmp_path):
    said = []

    def start_another():
        with pytest.raises(RuntimeError) as error:
            trainer(**SAVED).train()
        said.append(str(error.value))

    run = trainer(reward_funcs=at_step(2, start_another), **SAVED)
    run.train()
    assert said == [
        f"`output_dir='{tmp_path / 'run'}'`: another run is training in this folder, and both would write the same "
        "files. Choose another folder, or wait for its end."
    ]
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 2, 3]
    assert_same(weights(run.model), whole(trainer, tmp_path))
    trainer(**SAVED).train(resume_from_checkpoint=True)  # the folder is free again


@pytest.mark.slow
def test_a_second_process_in_the_same_folder_is_refused(trainer, tmp_path, model_folder):
    ended = []

    def start_another():
        ended.extend(run_all(model_folder, [{"output_dir": str(tmp_path / "run")}]))

    trainer(reward_funcs=at_step(2, start_another), **SAVED).train()
    assert ended == [[1]]
    assert "another run is training in this folder" in (tmp_path / "run.0.log").read_text()
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 2, 3]


def test_the_newest_checkpoint_stays_when_the_clock_goes_back(trainer, tmp_path):
    def clock_goes_back():
        for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
            later = checkpoint.stat().st_mtime + 7200
            os.utime(checkpoint, (later, later))

    options = {**SAVED, "max_steps": 4, "save_total_limit": 2}
    run = trainer(reward_funcs=at_step(3, clock_goes_back), **options)
    run.train()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = trainer(**options)
    again.train(resume_from_checkpoint=True)
    assert_same(weights(again.model), weights(run.model))
