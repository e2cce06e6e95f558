"""What docs/extending.md says: what is added has a file of its own, and is named in one place besides."""

import ast
import importlib
import inspect
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

import es_trainer
from es_trainer import backends, cli, engines, rewards, tasks
from es_trainer.backends import Backend
from es_trainer.choices import PerturbationName, Rule
from es_trainer.engines import Engine
from es_trainer.evolution.update_rules import SGD, UPDATE_RULES
from es_trainer.noise import shapes
from es_trainer.noise.shapes import SHAPES, Gaussian
from es_trainer.tasks import Task
from es_trainer.weights import layouts
from es_trainer.weights.layouts import Layout


ROOT = Path(es_trainer.__file__).parent


def defined(package, condition) -> dict[str, object]:
    """What the files of a package define and meets a condition, by name."""
    found = {}
    for path in Path(package.__file__).parent.glob("*.py"):
        name = package.__name__ if path.stem == "__init__" else f"{package.__name__}.{path.stem}"
        if path.stem == "vllm_worker":  # which only vLLM's processes can import
            continue
        module = importlib.import_module(name)
        found |= {
            key: value
            for key, value in vars(module).items()
            if getattr(value, "__module__", None) == name and not key.startswith("_") and condition(value)
        }
    return found


def kinds_of(base: type):
    return lambda value: inspect.isclass(value) and issubclass(value, base) and not inspect.isabstract(value)


def files_that_name(name: str) -> set[str]:
    """Files of the package whose code, apart from comments and texts, has the name."""
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {getattr(node, key, None) for key in ("id", "attr", "name")}
            if name in names:
                found.add(path.relative_to(ROOT).as_posix())
    return found


def test_noise_shapes():
    assert tuple(SHAPES) == get_args(PerturbationName)
    made = {name: type(make(1)) for name, make in SHAPES.items()}
    assert set(made.values()) == set(defined(shapes, kinds_of(Gaussian)).values())
    for name, shape in made.items():
        assert shape.__module__ == f"{shapes.__name__}.{name}"
    assert SHAPES["low_rank"](3).rank == 3


def test_update_rules():
    from es_trainer.evolution import update_rules

    assert tuple(UPDATE_RULES) == get_args(Rule)
    rules = {value for value in vars(update_rules).values() if kinds_of(SGD)(value)}
    assert set(UPDATE_RULES.values()) == rules


def test_backends():
    options = {
        "use_vllm": [True, False],
        "vllm_mode": ["colocate", "server"],
        "vllm_lora": [True, False],
        "deepspeed_plugin": [None, object()],
        "ds3_gather_for_generation": [True, False],
        "has_adapter": [True, False],
        "weight_quantization": [None, "int8"],
    }
    combinations = itertools.product(*options.values())
    given = [SimpleNamespace(**dict(zip(options, values, strict=True))) for values in combinations]
    chosen = {backends._kind(values, values) for values in given}
    assert chosen == set(defined(backends, kinds_of(Backend)).values())


def test_layouts():
    found = defined(layouts, kinds_of(Layout))
    (source,) = ast.parse(inspect.getsource(layouts.layout_of)).body
    called = {node.func.id for node in ast.walk(source) if isinstance(node, ast.Call)}
    # Quantized ones are made by who knows the modules that compute with them
    assert called - {"isinstance", "is_partitioned"} == set(found) - {"Quantized"}
    assert len({inspect.getfile(layout) for layout in found.values()}) == len(found)


def test_engines():
    found = defined(engines, kinds_of(Engine))
    assert set(found) == {name for name in engines.__all__ if name.endswith(("Engine", "Servers"))}


def test_tasks():
    def makes_a_task(value) -> bool:
        return inspect.isfunction(value) and inspect.signature(value).return_annotation is Task

    found = set(defined(tasks, makes_a_task)) - {"boxed_task"}
    assert found == set(tasks.__all__) - {"Task"}
    # The name of a task is that of its file
    assert found <= {path.stem for path in (ROOT / "tasks").glob("*.py")}


def test_rewards():
    found = defined(rewards, lambda value: inspect.isfunction(value) and value.__name__.endswith("_reward"))
    assert set(found) == {name for name in rewards.__all__ if name.endswith("_reward")}


def test_commands():
    found = {path.stem for path in (ROOT / "cli").glob("*.py") if "\ndef main(argv" in path.read_text()}
    assert found - {"__init__"} == {name.replace("-", "_") for name in cli.COMMANDS}


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("LowRank", {"noise/shapes/low_rank.py", "noise/shapes/__init__.py"}),
        ("Momentum", {"evolution/update_rules.py"}),
        ("Adam", {"evolution/update_rules.py"}),
        ("Lockstep", {"backends/zero3.py", "backends/__init__.py"}),
        ("QuantizedLocal", {"backends/quantized.py", "backends/__init__.py"}),
        ("Int8", {"weights/codecs.py"}),
        ("VLLMLoRA", {"backends/vllm_lora.py", "backends/__init__.py"}),
        ("Servers", {"backends/servers.py", "backends/servers_lora.py", "backends/__init__.py"}),
        ("VLLMAdapter", {"backends/vllm_adapter.py", "backends/servers_adapter.py", "backends/__init__.py"}),
        ("ServersAdapter", {"backends/servers_adapter.py", "backends/__init__.py"}),
        ("ServersLoRA", {"backends/servers_lora.py", "backends/__init__.py"}),
        (
            "VLLMAdapterServers",
            {"engines/vllm_adapter_servers.py", "engines/__init__.py", "backends/servers_adapter.py"},
        ),
        ("gsm8k", {"tasks/gsm8k.py", "tasks/__init__.py"}),
        ("conciseness_reward", {"rewards/conciseness.py", "rewards/__init__.py", "tasks/conciseness.py"}),
    ],
)
def test_what_is_there_is_named_where_it_is_chosen_and_used(name, files):
    assert files_that_name(name) == files
