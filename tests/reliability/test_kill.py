"""A process of a run is killed in each phase of a step, and the run is started again."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import history
from hub_server import TOKEN, Hub, serve
from safetensors.torch import load, load_file

from es_trainer import replay


HERE = Path(__file__).parent

# In which step each is done, and the steps of which members are evaluated after the run is started again
PHASES = {
    **{phase: (3, {3, 4}) for phase in ("ask", "generate", "score", "exchange", "update", "record")},
    **{phase: (4, set()) for phase in ("save model", "save state", "save checksums", "push")},
}
EARLY = {"score early": (2, {2, 3, 4}), "save state early": (2, {3, 4})}
KILLED_BY_SECOND = ("ask", "generate", "score", "exchange", "update")  # what both processes do


def run_all(model: str, runs: list[dict], **environment: str) -> list[list[int | None]]:
    """The exit statuses of the processes of each run."""
    path = f"{HERE.parent}:{HERE.parents[1]}"
    result = subprocess.run(
        [sys.executable, str(HERE / "forked_runs.py"), model, json.dumps(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def updates(folder: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "metrics"} for line in history(folder)]


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


class Killed:
    """Runs on some number of processes, each killed once and started again, and one that was left alone."""

    def __init__(self, folder: Path, model: str, hub: Hub, processes: int, names: dict[str, tuple[int, set[int]]]):
        self.folder, self.names, self.model, self.processes = folder, names, model, processes
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        runs = [{"output_dir": str(folder / "whole"), "processes": processes}]
        for name, (step, _) in names.items():
            phase = name.removesuffix(" early")
            run = {"output_dir": str(folder / name), "processes": processes}
            if phase == "push":
                run["config"] = {"push_to_hub": True, "hub_model_id": f"user/pushed-{processes}"}
            rank = processes - 1 if phase in KILLED_BY_SECOND else 0
            runs += [{**run, "phase": phase, "step": step, "rank": rank}, {**run, "resume": True}]
        self.ended = run_all(model, runs, **environment, HF_HOME=str(folder / "home"))
        self.killed = dict(zip(names, self.ended[1::2], strict=True))
        self.resumed = dict(zip(names, self.ended[2::2], strict=True))

    def check(self, name: str) -> None:
        """That the run was killed, and that what came of it is what came of the one that was left alone."""
        last = -1 if name.removesuffix(" early") in KILLED_BY_SECOND else 0
        assert self.killed[name][last] == -signal.SIGKILL
        assert None not in self.killed[name], "a process that was left over hangs"
        assert set(self.resumed[name]) == {0}, self.log(name)
        seen = [file.read_text().split() for file in self.folder.glob(f"{name}.*.seen")]
        again = {int(step) for steps in seen for step in steps}
        # Of two processes, the first may have written the line while the other was killed
        assert again <= self.names[name][1] and (again == self.names[name][1] or self.processes == 2)
        final = load_file(self.folder / name / "final" / "model.safetensors")
        assert_same(final, load_file(self.folder / "whole" / "final" / "model.safetensors"))
        assert updates(self.folder / name) == updates(self.folder / "whole")
        assert_same(dict(replay(self.model, self.folder / name).named_parameters()), final)

    def log(self, name: str) -> str:
        """What process 0 of the resumed run printed."""
        return (self.folder / f"{name}.0.log").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def one(folder, model_folder, hub) -> Killed:
    return Killed(folder / "one", model_folder, hub, 1, PHASES | EARLY)


@pytest.fixture(scope="module")
def two(folder, model_folder, hub) -> Killed:
    return Killed(folder / "two", model_folder, hub, 2, PHASES)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES | EARLY)
def test_a_run_that_was_killed_goes_on_exactly(one, phase):
    one.check(phase)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_two_processes_of_which_one_was_killed_go_on_exactly(two, phase):
    two.check(phase)


@pytest.mark.slow
def test_a_push_that_was_killed_is_made_up_for(one, two, hub):
    for runs, name in ((one, "user/pushed-1"), (two, "user/pushed-2")):
        arrived = load(hub.models[name].files["model.safetensors"])
        assert_same(arrived, load_file(runs.folder / "whole" / "final" / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["save model", "save state", "save state early"])
def test_a_checkpoint_that_was_not_complete_is_named(one, phase):
    number = 2 if phase.endswith("early") else 4
    said = f"passes over checkpoint-{number}: The checkpoint {one.folder / phase / f'checkpoint-{number}'} has no"
    assert said in one.log(phase)
