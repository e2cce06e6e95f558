"""Real processes, started by accelerate or torchrun. A launch takes seconds, so each does several runs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import yaml
from distributed_run import Run, train
from safetensors.torch import load_file

from es_trainer import replay
from es_trainer.smollm2 import smollm2


SCRIPT = Path(__file__).with_name("distributed_run.py")
RECIPES = Path(__file__).parents[1] / "recipes" / "accelerate_configs"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
OFFLOADED = {"gaussian": True, "low_rank": True, "sampled": False}  # runs on offloaded weights, and whether gathered


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launcher(config: Path, processes: int, model: str, runs: list[dict], *options: str) -> list[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(processes), *options]
    return [*command, str(SCRIPT), model, json.dumps(runs)]


def launch(config: Path, processes: int, model: str, runs: list[dict]) -> subprocess.CompletedProcess:
    command = launcher(config, processes, model, runs, "--main_process_port", str(free_port()))
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def launched(config: Path, processes: int, model: str, runs: list[dict]) -> str:
    """What was printed."""
    result = launch(config, processes, model, runs)
    assert result.returncode == 0, result.stderr
    return result.stdout


def records(folder: Path) -> list[dict]:
    """What each process recorded, by rank."""
    errors = [file.read_text() for file in folder.glob("error-*.txt")]
    assert not errors
    return [json.loads(file.read_text()) for file in sorted(folder.glob("record-*.json"))]


def errors(folder: Path) -> list[str]:
    """What each process raised, by rank."""
    return [file.read_text() for file in sorted(folder.glob("error-*.txt"))]


def without_clock(log: dict) -> dict:
    clock = ("seconds", "per_second", "runtime", "step_time")
    log = {key: value for key, value in log.items() if not key.endswith(clock)}
    # The Trainer averages the loss over processes in float32, and sums of parts depend on the parts
    inexact = ("train_loss", "update_norm", "mean", "std", "reward", "eval_loss", "calls", "random_walk_distance")
    log = {key: pytest.approx(value, rel=1e-6) if key.endswith(inexact) else value for key, value in log.items()}
    if "distance_from_start" in log:  # a large model's is measured on a sample of each part
        log["distance_from_start"] = pytest.approx(log["distance_from_start"], rel=1e-3)
    return log


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same_weights(mine: Path, theirs: Path) -> None:
    mine, theirs = weights(mine), weights(theirs)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        assert mine[name].dtype == theirs[name].dtype
        assert torch.equal(mine[name], theirs[name]), name


def assert_same_run(mine: Path, theirs: Path) -> None:
    assert_same_weights(mine / "final", theirs / "final")
    ours, other = records(mine)[0], records(theirs)[0]
    assert list(map(without_clock, ours["history"])) == list(map(without_clock, other["history"]))
    for record in records(mine)[1:]:
        assert list(map(without_clock, record["history"])) == list(map(without_clock, ours["history"]))


def assert_same_verdicts(mine: Path, theirs: Path) -> None:
    """A reward model's last digits differ between processes, and with them the weights'."""
    ours, other = (
        [log["rewards/judge/mean"] for log in records(path)[0]["history"] if "reward" in log]
        + [records(path)[0]["evaluation"]["eval_rewards/judge/mean"]]
        for path in (mine, theirs)
    )
    assert len(ours) == 4 and ours == pytest.approx(other, rel=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


# ---- runs that are the same, however the work is divided ----

SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
RUNS = {
    "gaussian": {"evaluate": True, "config": {"eval_strategy": "steps", "eval_steps": 1, "evaluate_center": True}},
    "antithetic": {"config": {"antithetic": True, "population_size": 6, "fitness_shaping": "prompt_z_score"}},
    "low_rank": {
        "config": {
            **{"perturbation": "low_rank", "perturbation_rank": 2, "bf16": True},
            **{"evaluate_center": True, "population_batch_size": 3},
        },
        "evaluate": True,
    },
    "sampled": {
        "config": {
            **{"temperature": 1.0, "num_generations": 2, "generation_batch_size": 3},
            "generation_reward": "pass@2",
        },
        "stream": True,
    },
    "adam": {
        "config": {
            **{"es_optimizer": "adam", "anchor_decay": 0.1, "anchor_weights": "model", "master_weights": "host"},
            **{"bf16": True, **SAVED},
        }
    },
    "more_processes": {"config": {"population_size": 2, "num_prompts_per_step": 1, "bf16": True}},
    "adapter": {"adapter": True, "config": {"learning_rate": 0.2, "bf16": True}},
    "judge": {"judge": True, "config": {"reward_weights": [1.0, 0.5]}, "evaluate": True},
    "object": {"model_object": True, "evaluate": True},
    "program": {"program": True, "evaluate": True},
    "set": {
        "of_set": True,
        "config": {"evaluate_center": True, "multi_objective_aggregation": "normalize_then_sum"},
        "evaluate": True,
    },
    "unique": {
        "config": {
            **{"unique_prompts": True, "antithetic": True, "population_size": 6, "num_prompts_per_step": 1},
            **{"perturbation": "low_rank", "temperature": 1.0, "evaluate_center": True},
        },
    },
    "int8": {
        "config": {
            **{"perturbation": "low_rank", "weight_quantization": "int8", "master_weights": "host"},
            **{"bf16": True, "population_batch_size": 3},
        },
        "evaluate": True,
    },
    "unique_singles": {"config": {"unique_prompts": True, "population_size": 3, "num_prompts_per_step": 2}},
    "best": {
        "config": {
            **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
            **{"load_best_model_at_end": True, "learning_rate": 0.3, "max_steps": 4},
            **{"eval_kl_prompts": 2, "auto_step": 2, "auto_step_prompts": 2},
        },
        "evaluate": True,
    },
}


# Launched processes take minutes for all. Three share out members and prompts otherwise than two; in lockstep, all
# processes evaluate each member
ON_THREE = ("gaussian", "antithetic", "low_rank", "sampled", "more_processes", "program", "set", "unique")
GATHERED = tuple(name for name in RUNS if name != "int8")  # which needs all weights in each process
IN_LOCKSTEP = ("gaussian", "low_rank", "sampled", "adam", "adapter", "judge", "object", "set", "unique_singles")


def several(folder: Path, names: Iterable[str] = RUNS) -> list[dict]:
    return [{"output_dir": str(folder / name), **RUNS[name]} for name in names]


@pytest.fixture(scope="module")
def one(folder, model_folder) -> Path:
    """The runs on one process."""
    for run in several(folder / "one"):
        train(model_folder, Run(**run))
    return folder / "one"


def on_cpu(recipe: str, folder: Path) -> Path:
    """A recipe for GPUs, for processes on CPU."""
    path = folder / recipe
    path.write_text(yaml.safe_dump(yaml.safe_load((RECIPES / recipe).read_text()) | {"use_cpu": True}))
    return path


@pytest.fixture(scope="module")
def two(folder, model_folder) -> Path:
    launched(RECIPES / "cpu_two_processes.yaml", 2, model_folder, several(folder / "two"))
    return folder / "two"


@pytest.fixture(scope="module")
def three(folder, model_folder) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    command += [str(SCRIPT), model_folder, json.dumps(several(folder / "three", ON_THREE))]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=600)
    return folder / "three"


@pytest.fixture(scope="module")
def gathered(folder, model_folder) -> Path:
    launched(on_cpu("zero3.yaml", folder), 2, model_folder, several(folder / "gathered", GATHERED))
    return folder / "gathered"


@pytest.fixture(scope="module")
def lockstep(folder, model_folder) -> Path:
    runs = several(folder / "lockstep", IN_LOCKSTEP)
    for run in runs:
        run["config"] = {**run.get("config", {}), **in_lockstep(run), "ds3_gather_for_generation": False}
    failing = {"output_dir": str(folder / "lockstep" / "failing"), "fail_at": 2}
    runs.insert(0, {**failing, "config": {"ds3_gather_for_generation": False}})
    launched(on_cpu("zero3.yaml", folder), 2, model_folder, runs)
    return folder / "lockstep"


def in_lockstep(run: dict) -> dict:
    # Processes share out prompts, and in bfloat16 the size of a batch decides between tokens that are nearly as likely
    return {"bf16": False} if run.get("config", {}).get("num_prompts_per_step") != 1 else {}


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("two", name) for name in RUNS),
        *(("three", name) for name in ON_THREE),
        *(("gathered", name) for name in GATHERED),
    ],
)
def test_runs_are_the_same_on_one_process_and_on_several(request, one, way, name):
    several = request.getfixturevalue(way)
    if name == "judge":
        assert_same_verdicts(several / name, one / name)
        return
    assert_same_run(several / name, one / name)
    if RUNS[name].get("evaluate"):
        metrics = [without_clock(record["evaluation"]) for record in records(several / name)]
        assert all(metric == without_clock(records(one / name)[0]["evaluation"]) for metric in metrics)


@pytest.mark.parametrize("name", IN_LOCKSTEP)
def test_runs_are_the_same_in_lockstep(lockstep, one, folder, model_folder, name):
    reference = one / name
    if name == "judge":
        assert_same_verdicts(lockstep / name, one / name)
        return
    if in_lockstep(RUNS[name]) and RUNS[name].get("config", {}).get("bf16"):
        reference = folder / "float32" / name
        run = {**RUNS[name], "config": {**RUNS[name]["config"], "bf16": False}}
        train(model_folder, Run(str(reference), **run))
    assert_same_run(lockstep / name, reference)


@pytest.fixture(scope="module")
def offloaded(folder, model_folder) -> Path:
    runs = [{"output_dir": str(folder / "offloaded" / name), **RUNS[name]} for name in OFFLOADED]
    for run in runs:
        run["config"] = {**run["config"], "ds3_gather_for_generation": OFFLOADED[Path(run["output_dir"]).name]}
    launched(on_cpu("zero3_cpu_offload.yaml", folder), 2, model_folder, runs)
    return folder / "offloaded"


@pytest.mark.parametrize("name", OFFLOADED)
def test_runs_are_the_same_with_offloaded_weights(offloaded, one, name):
    assert_same_run(offloaded / name, one / name)


def test_runs_are_the_same_on_several_machines(folder, model_folder, one):
    """The recipe for several machines, twice on this one."""
    config, output = on_cpu("multi_node.yaml", folder), folder / "machines"
    runs, port = [{"output_dir": str(output), **RUNS["gaussian"]}], str(free_port())
    machines = [
        subprocess.Popen(
            launcher(config, 2, model_folder, runs, "--machine_rank", str(rank), "--main_process_port", port),
            env=ENVIRONMENT,
        )
        for rank in range(2)
    ]
    assert [machine.wait(120) for machine in machines] == [0, 0]
    assert_same_run(output, one / "gaussian")


@pytest.mark.parametrize(("recipe", "processes"), [("single_gpu.yaml", 1), ("multi_gpu.yaml", 2)])
def test_recipes_for_gpus_run_on_cpu(folder, model_folder, one, recipe, processes):
    output = folder / recipe.removesuffix(".yaml")
    launched(on_cpu(recipe, folder), processes, model_folder, [{"output_dir": str(output), **RUNS["gaussian"]}])
    assert len(records(output)) == processes
    assert_same_run(output, one / "gaussian")


def test_every_recipe_is_tried():
    tried = Path(__file__).read_text()
    recipes = [path.name for path in RECIPES.iterdir()]
    assert len(recipes) == 6 and all(f'"{recipe}"' in tried for recipe in recipes)


# ---- going on from a checkpoint, on as many processes or others ----


def resumed(folder: Path, checkpoint: Path, **config) -> dict:
    config = {**RUNS["adam"]["config"], **config}
    return {"output_dir": str(folder), "config": config, "resume": str(checkpoint / "checkpoint-2")}


@pytest.fixture(scope="module")
def resumed_on_three(one, gathered, folder, model_folder) -> Path:
    runs = [
        resumed(folder / "from two parts", gathered / "adam"),
        resumed(folder / "from the whole", one / "adam"),
        resumed(folder / "missing", folder / "incomplete"),
    ]
    shutil.copytree(gathered / "adam", folder / "incomplete")
    (folder / "incomplete" / "checkpoint-2" / "optimizer" / "__1_0.distcp").unlink()
    launched(on_cpu("zero3.yaml", folder), 3, model_folder, runs)
    return folder


@pytest.mark.parametrize("name", ["from two parts", "from the whole"])
def test_partitioned_weights_resume_on_another_number_of_processes(one, resumed_on_three, name):
    assert_same_weights(resumed_on_three / name / "final", one / "adam" / "final")


def test_an_incomplete_partitioned_checkpoint_is_refused(resumed_on_three):
    found = errors(resumed_on_three / "missing")
    assert len(found) == 3 and all("has no complete optimizer/" in error for error in found)


def test_one_process_resumes_what_was_partitioned(one, gathered, folder, model_folder):
    train(model_folder, Run(**resumed(folder / "alone", gathered / "adam")))
    assert_same_weights(folder / "alone" / "final", one / "adam" / "final")


def test_the_parts_of_a_checkpoint_are_small(one, gathered):
    whole, parts = (
        [file.stat().st_size for file in (run / "adam" / "checkpoint-2" / "optimizer").glob("*.distcp")]
        for run in (one, gathered)
    )
    assert (
        len(whole) == 1 and len(parts) == 2 and max(parts) < 0.7 * whole[0]
    )  # of such small tensors, what is said about each counts


def test_the_history_of_several_processes_rebuilds_the_weights(two, gathered, lockstep, model_folder, tmp_path):
    for folder in (two, gathered, lockstep):
        replay(model_folder, folder / "adam").save_pretrained(tmp_path)
        assert_same_weights(tmp_path, folder / "adam" / "final")


# ---- shares ----


@pytest.fixture(scope="module")
def shares(folder, model_folder) -> Path:
    runs = [
        {"output_dir": str(folder / "slow"), "config": {"max_steps": 2}, "delay_of_last": 0.5},
        {"output_dir": str(folder / "batched"), "config": {"max_steps": 2, "perturbation": "low_rank"}},
        {"output_dir": str(folder / "table"), "config": {"log_completions": True, "num_completions_to_print": 1}},
        {"output_dir": str(folder / "drift"), "config": {"master_weights": "none"}},
        {"output_dir": str(folder / "no drift"), "config": {"master_weights": "none", "perturbation": "low_rank"}},
    ]
    printed = launched(RECIPES / "cpu_two_processes.yaml", 2, model_folder, runs)
    (folder / "printed").write_text(printed)
    return folder


def test_completions_of_the_best_member_are_printed_once_whoever_has_them(shares):
    printed = (shares / "printed").read_text()
    assert [printed.count(f"Step {step}: completions of the best member") for step in (1, 2, 3)] == [1, 1, 1]


def test_who_is_slow_evaluates_fewer_members(shares):
    fast, slow = (record["evaluated"] for record in records(shares / "slow"))
    assert fast + slow == 2 * 7 and 1 <= slow < fast


def test_no_process_takes_the_whole_population_as_its_batch(shares):
    assert all(2 * 3 <= record["evaluated"] <= 2 * 4 for record in records(shares / "batched"))


def test_weights_that_would_drift_apart_are_refused(shares):
    assert all("would drift apart" in error for error in errors(shares / "drift"))
    assert len(errors(shares / "drift")) == 2
    assert len(records(shares / "no drift")) == 2


# ---- what goes wrong ----

FAULTS = {
    "seed": ({"config_of_last": {"seed": 1}}, "`seed` is 1 on process 1, but 42 on process 0"),
    "steps": ({"config_of_last": {"eval_steps": 5}}, "`eval_steps` is 5 on process 1, but None on process 0"),
    "data": ({"words_of_last": ["one", "two"]}, "the content of `train_dataset` is '2 rows"),
    "version": ({"version_of_last": "0.1"}, "the version of numpy is '0.1' on process 1"),
    "model": ({"model_object": True, "model_of_last": {"num_hidden_layers": 1}}, "the parameters of the model is"),
    "stream": (
        {"stream": True, "words_of_last": [*"abcdefg"], "config": {"max_steps": 2}},
        "the checksum of the prompts of step 1 is",
    ),
    "spoilt": (
        {"spoil_at": 2, "config": {"consistency_check_steps": 2, "max_steps": 4}},
        "After update 2, processes have different weights: `model.layers.0.self_attn.v_proj.weight` on process 1.",
    ),
    "spoilt before a checkpoint": (
        {"spoil_at": 2, "config": {"save_strategy": "steps", "save_steps": 3}},
        "After update 3, processes have different weights",
    ),
    "reward": ({"fail_at": 2}, "Reward function 'letters' raised ValueError: no reward today"),
    "reward in evaluation": ({"fail_at": 4, "evaluate": True}, "no reward today"),
}


@pytest.fixture(scope="module")
def faults(folder, model_folder) -> Path:
    runs = [{"output_dir": str(folder / "faults" / name), **run} for name, (run, _) in FAULTS.items()]
    runs.append({"output_dir": str(folder / "faults" / "none"), **RUNS["gaussian"]})
    launched(RECIPES / "cpu_two_processes.yaml", 2, model_folder, runs)
    return folder / "faults"


@pytest.mark.parametrize("name", FAULTS)
def test_what_goes_wrong_on_one_process_ends_all_with_its_reason(faults, name):
    found = errors(faults / name)
    assert len(found) == 2
    assert all(FAULTS[name][1] in error for error in found), found
    if name == "spoilt before a checkpoint":
        assert not list((faults / name).glob("checkpoint-*"))


def test_a_reward_that_raises_ends_all_processes_in_lockstep(lockstep):
    found = errors(lockstep / "failing")
    assert len(found) == 2 and all("raised ValueError: no reward today" in error for error in found), found


def test_processes_are_together_again_after_an_error(faults, one):
    assert_same_run(faults / "none", one / "gaussian")


def start(rank: int, port: int, model: str, runs: list[dict]) -> subprocess.Popen:
    """One of two processes without a launcher that would end it when the other is gone."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**ENVIRONMENT, **{key: str(value) for key, value in place.items()}}
    return subprocess.Popen([sys.executable, str(SCRIPT), model, json.dumps(runs)], env=environment)


@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_end_when_a_process_is_killed(folder, model_folder, one, killed):
    output = folder / f"killed {killed}"
    run = {"output_dir": str(output), **RUNS["adam"], "kill_at": 4, "kill_rank": killed}
    port = free_port()
    processes = [start(rank, port, model_folder, [run]) for rank in range(2)]
    assert processes[killed].wait(120) == -signal.SIGKILL
    moment = time.monotonic()
    processes[1 - killed].wait(60)
    assert time.monotonic() - moment < 30
    error = (output / f"error-{1 - killed}.txt").read_text()
    assert error.startswith("ProcessError: The connection to another process is lost")
    assert "resume_from_checkpoint=True" in error

    train(model_folder, Run(**resumed(output, output)))
    assert_same_weights(output / "final", one / "adam" / "final")


def test_a_launch_fails_when_a_process_is_killed(folder, model_folder):
    run = {"output_dir": str(folder / "launch"), "kill_at": 2, "config": {"ds3_gather_for_generation": False}}
    result = launch(on_cpu("zero3.yaml", folder), 2, model_folder, [run])
    assert result.returncode != 0
    assert "SIGKILL" in result.stderr


# ---- a real model ----

REAL = {
    "gaussian": {"sigma": 0.01},
    "low_rank": {"sigma": 0.01, "perturbation": "low_rank", "population_batch_size": 2},
}
WAYS = {"two": "cpu_two_processes.yaml", "gathered": "zero3.yaml", "lockstep": "zero3.yaml"}


@pytest.fixture(scope="module")
def real_runs(folder) -> Path:
    model = smollm2()
    for way in ("one", *WAYS):
        runs = [
            {
                "output_dir": str(folder / "real" / way / name),
                "config": {
                    **config,
                    **{"population_size": 4, "num_prompts_per_step": 2, "max_completion_length": 6, "max_steps": 1},
                    "ds3_gather_for_generation": way != "lockstep",
                },
            }
            for name, config in REAL.items()
        ]
        if way == "one":
            for run in runs:
                train(model, Run(**run))
        else:
            launched(on_cpu(WAYS[way], folder), 2, model, runs)
    return folder / "real"


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("way", WAYS)
def test_a_real_model_is_trained_the_same_on_two_processes(real_runs, way, name):
    assert_same_run(real_runs / way / name, real_runs / "one" / name)


# ---- what DeepSpeed and gloo do on their own ----


@pytest.mark.slow
def test_processes_end_cleanly(folder, model_folder):
    """They aborted in one of eight launches, after all was done."""
    for number in range(16):
        launched(on_cpu("zero3.yaml", folder), 2, model_folder, [{"output_dir": str(folder / f"end {number}")}])


def test_no_compiler_is_needed(folder, model_folder, tmp_path):
    """What DeepSpeed builds goes into the folder that is named here."""
    environment = {**ENVIRONMENT, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/nowhere", "CC": "/nowhere"}
    output = folder / "no compiler"
    command = launcher(on_cpu("zero3.yaml", folder), 2, model_folder, [{"output_dir": str(output)}])
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
    assert len(records(output)) == 2 and not list(tmp_path.iterdir())
