"""Datasets and reward functions by name."""

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trl import DatasetMixtureConfig, ScriptArguments

from ..paths import check_local
from .arguments import RewardArguments
from .metric_names import PREFIX, MetricName
from .mistakes import suggestion


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from ..rewards.scorer import RewardFunc
    from ..tasks import Task


@dataclass
class ESScriptArguments(RewardArguments, ScriptArguments):
    """
    Script arguments for training with evolution strategies, beside those of [`RewardArguments`].

    Args:
        system_prompt (`str`, *optional*):
            System message for every prompt, in place of the one it may have. It is put before prompts that are text.
    """

    system_prompt: str | None = field(
        default=None, metadata={"help": "System message for every prompt, in place of the one it may have."}
    )


class DataArguments(Protocol):
    """What says which data and rewards to take, in the arguments of several commands."""

    task: str | None
    dataset_name: str | None
    dataset_config: str | None
    dataset_streaming: bool
    system_prompt: str | None
    reward_funcs: list[str] | None
    reward_model_name_or_path: str | None
    agent: str | None


def check_data(arguments: DataArguments, mixture: DatasetMixtureConfig) -> None:
    """
    Look through what `load_data` will be given, before anything is loaded.

    Raises:
        `ValueError`: If no data or no reward is named, data is named twice, or a name is unknown.
        `FileNotFoundError`: If a local file or folder does not exist.
    """
    check_local("dataset_name", arguments.dataset_name)
    check_local("reward_model_name_or_path", arguments.reward_model_name_or_path, folder=True)
    if mixture.datasets and (arguments.task or arguments.dataset_name):
        raise ValueError("`datasets` is given together with `task` or `dataset_name`: leave out one of them.")
    if arguments.task is not None:
        _task_function(arguments.task, arguments.dataset_name, arguments.dataset_config)
    elif not mixture.datasets and arguments.dataset_name is None:
        raise ValueError(f"Nothing says which data to take: set `task` ({', '.join(_tasks())}) or `dataset_name`.")
    elif not (arguments.reward_funcs or arguments.reward_model_name_or_path or arguments.agent):
        raise ValueError(
            "Nothing says how completions are rewarded: set `reward_funcs` (ready-made: "
            f"{', '.join(_ready_made())}), `reward_model_name_or_path` or `agent`."
        )
    if arguments.agent is not None:
        if "." not in arguments.agent:
            raise ValueError(f"`agent={arguments.agent!r}` is no dotted path of a function, such as my_agent.solve.")
        if arguments.system_prompt is not None:
            raise ValueError("`system_prompt` is set together with `agent`, which writes the messages itself.")
    for name in arguments.reward_funcs or []:
        if ":" not in name and "." not in name and name not in _ready_made():
            raise ValueError(
                f"`reward_funcs` has {name!r}, which is neither one of {', '.join(_ready_made())}, nor "
                f"'evaluate:metric', nor the dotted path of a function{suggestion(name, _ready_made())}"
            )


def load_data(
    arguments: DataArguments, mixture: DatasetMixtureConfig
) -> tuple[Mapping[str, "Dataset | IterableDataset"], list["RewardFunc"]]:
    """
    Load datasets and reward functions.

    Args:
        arguments ([`DataArguments`]):
            What to load; `check_data` has nothing against it.
        mixture ([`~trl.DatasetMixtureConfig`]):
            Datasets to mix, in place of `task` and `dataset_name`.

    Returns:
        `tuple`: The dataset of each split (those of a task are called `"train"` and `"test"`), and the reward
        functions.

    Raises:
        `ValueError`: If a reward function does not exist.
    """
    from datasets import load_dataset
    from trl import get_dataset

    reward_funcs: list[RewardFunc] = []
    if arguments.task is not None:
        task = load_task(arguments.task, arguments.dataset_name, arguments.dataset_config)
        splits = {"train": task.train_dataset, "test": task.eval_dataset}
        reward_funcs = task.reward_funcs
    elif mixture.datasets:
        splits = get_dataset(mixture)
    else:
        path, options = Path(arguments.dataset_name), {}
        if path.is_file():  # `load_dataset` takes folders
            path, options = path.resolve().parent, {"data_files": path.name}
        splits = load_dataset(
            str(path), name=arguments.dataset_config, streaming=arguments.dataset_streaming, **options
        )
    if arguments.reward_funcs or arguments.reward_model_name_or_path:
        reward_funcs = load_reward_funcs(arguments.reward_funcs or [])
        if arguments.reward_model_name_or_path:
            reward_funcs.insert(0, arguments.reward_model_name_or_path)
    if arguments.system_prompt is not None:
        splits = {
            name: split.map(lambda row: {"prompt": with_system_prompt(row["prompt"], arguments.system_prompt)})
            for name, split in splits.items()
        }
    return splits, reward_funcs


def pick_split(
    splits: Mapping[str, "Dataset | IterableDataset"], option: str, name: str
) -> "Dataset | IterableDataset":
    """
    The split that an option names.

    Raises:
        `ValueError`: If there is no such split.
    """
    if name not in splits:
        raise ValueError(f"`{option}={name!r}`: the dataset has the splits {', '.join(map(repr, splits))}.")
    return splits[name]


def with_system_prompt(prompt: str | list[dict[str, Any]], system_prompt: str) -> str | list[dict[str, Any]]:
    """The prompt with a system message of its own, or after the text."""
    if isinstance(prompt, str):
        return f"{system_prompt}\n\n{prompt}"
    return [
        {"role": "system", "content": system_prompt},
        *(message for message in prompt if message["role"] != "system"),
    ]


def load_task(name: str, dataset_name: str | None = None, dataset_config: str | None = None) -> "Task":
    """
    Load a task.

    Args:
        name (`str`):
            A task of `es_trainer.tasks`, such as `"countdown"` or `"reasoning_gym:mini_sudoku"`.
        dataset_name (`str`, *optional*):
            Dataset that the task's rows come from. If `None`, the task's own choice.
        dataset_config (`str`, *optional*):
            Its configuration.

    Raises:
        `ValueError`: If there is no such task, or its rows do not come from a dataset.
    """
    options = {"dataset_name": dataset_name, "dataset_config": dataset_config}
    function = _task_function(name, dataset_name, dataset_config)
    return function(**{option: value for option, value in options.items() if value is not None})


def _tasks() -> dict[str, Callable[..., "Task"]]:
    from .. import tasks

    return {name: getattr(tasks, name) for name in tasks.__all__ if inspect.isfunction(getattr(tasks, name))}


def _task_function(task: str, dataset_name: str | None, dataset_config: str | None) -> Callable[..., "Task"]:
    """The function of `"name"` or `"name:argument"`, where the argument is a first one without a default."""
    tasks = _tasks()
    name, colon, argument = task.partition(":")
    if name not in tasks:
        raise ValueError(f"`task={task!r}` is not one of {', '.join(tasks)}{suggestion(name, tasks)}")
    parameters = inspect.signature(tasks[name]).parameters
    first = next(iter(parameters.values()))
    takes_argument = first.default is first.empty
    if takes_argument and not argument:
        raise ValueError(f"`task={task!r}` does not say which {first.name}: set `task` to {f'{name}:NAME'!r}.")
    if colon and not takes_argument:
        raise ValueError(f"`task={task!r}` has a colon, but {name!r} takes nothing after it: set `task` to {name!r}.")
    for option, value in (("dataset_name", dataset_name), ("dataset_config", dataset_config)):
        if value is not None and option not in parameters:
            raise ValueError(
                f"`{option}={value!r}` has no meaning for `task={task!r}`. Leave out `{option}`, or leave out `task` "
                "and set `reward_funcs`."
            )
    return partial(tasks[name], argument) if takes_argument else tasks[name]


def load_reward_funcs(names: list[str]) -> list[Callable]:
    """
    Load reward functions.

    Args:
        names (`list[str]`):
            As in `RewardArguments.reward_funcs`.

    Raises:
        `ValueError`: If there is no such function.
    """
    return [_load_reward_func(name) for name in names]


def _ready_made() -> dict[str, Callable]:
    """Modules of the ready-made reward functions."""
    import trl.rewards

    from .. import rewards

    own = [name for name in rewards.__all__ if name.endswith("_reward") and name != "evaluate_reward"]
    theirs = ["accuracy_reward", "get_soft_overlong_punishment", "reasoning_accuracy_reward", "think_format_reward"]
    return {**dict.fromkeys(theirs, trl.rewards), **dict.fromkeys(own, rewards)}


def _load_reward_func(name: str) -> Callable:
    from ..rewards import evaluate_reward

    if name.startswith(PREFIX):
        named = MetricName.parse(name)
        return evaluate_reward(named.metric, score=named.score, **_metric_arguments(named.arguments))
    ready_made = _ready_made()
    if name in ready_made:
        function = getattr(ready_made[name], name)
        if name == "get_soft_overlong_punishment":
            return function(max_completion_len=1280, soft_punish_cache=256)
        return function
    return import_function("reward_funcs", name)


def _metric_arguments(arguments: dict[str, str]) -> dict[str, Any]:
    """Arguments of `evaluate_reward`, of which values may be JSON."""
    found: dict[str, Any] = {}
    for key, text in arguments.items():
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    if "postprocess" in found:
        found["postprocess"] = import_function("reward_funcs", found["postprocess"])
    return found


def load_agent(path: str | None) -> Callable | None:
    """
    The program of a dotted path, if there is one.

    Raises:
        `ValueError`: If there is no such function.
    """
    return None if path is None else import_function("agent", path)


def import_function(option: str, path: str) -> Callable:
    """
    The function of a dotted path, which may be in the working directory.

    Args:
        option (`str`):
            The option that was given the path.
        path (`str`):
            Such as `"my_lib.rewards.custom_reward"`.

    Raises:
        `ValueError`: If there is no such function.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"`{option}={path!r}` is no dotted path of a function, such as my_lib.{path or 'function'}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # something that the module imports
            raise
        raise ValueError(
            f"`{option}` has {path!r}, but there is no module {error.name!r}, neither in {os.getcwd()} nor among "
            "the installed packages."
        ) from error
    if not hasattr(module, name):
        raise ValueError(
            f"`{option}` has {path!r}, but {module.__file__} has no {name!r}{suggestion(name, dir(module))}"
        )
    return getattr(module, name)
