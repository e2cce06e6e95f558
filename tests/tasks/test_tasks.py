import dataclasses
import time
from fractions import Fraction
from itertools import permutations

import pytest

from es_trainer.rewards import conciseness_reward, countdown_reward
from es_trainer.tasks import Task, conciseness, countdown


def reachable(values: list[Fraction], target: int) -> bool:
    """Brute force over every way to combine the values."""
    if len(values) == 1:
        return values[0] == target
    for i, j in permutations(range(len(values)), 2):
        a, b = values[i], values[j]
        rest = [value for k, value in enumerate(values) if k not in (i, j)]
        for result in (a + b, a - b, a * b, *([a / b] if b else [])):
            if reachable([*rest, result], target):
                return True
    return False


def keys(dataset):
    return [(tuple(sorted(row["numbers"])), row["target"]) for row in dataset]


def test_brute_force_can_say_no():
    assert reachable([Fraction(n) for n in (3, 3, 8, 8)], 24)
    assert not reachable([Fraction(n) for n in (1, 1, 1, 1)], 24)


def test_countdown_puzzles_are_solvable():
    task = countdown(train_size=300, eval_size=100, seed=3)
    for row in [*task.train_dataset, *task.eval_dataset]:
        assert reachable([Fraction(n) for n in row["numbers"]], row["target"]), row


def test_countdown_has_the_sizes_and_ranges_of_the_paper():
    task = countdown(train_size=1000, eval_size=200)
    assert task.name == "countdown"
    assert task.reward_funcs == [countdown_reward]
    for dataset, size in ((task.train_dataset, 1000), (task.eval_dataset, 200)):
        assert dataset.column_names == ["prompt", "numbers", "target"]
        assert len(dataset) == size
        assert sorted(map(len, dataset["numbers"])) == [3] * (size // 2) + [4] * (size // 2)
        assert all(1 <= number <= 99 for numbers in dataset["numbers"] for number in numbers)
        assert all(1 <= target <= 100 for target in dataset["target"])
    numbers = {number for numbers in task.train_dataset["numbers"] for number in numbers}
    assert numbers == set(range(1, 100))
    assert len(set(task.train_dataset["target"])) > 90


def test_countdown_puzzles_are_distinct_within_and_across_splits(monkeypatch):
    # Small numbers, so that repetitions are certain to come up.
    monkeypatch.setitem(countdown.__globals__, "LARGEST_NUMBER", 4)
    task = countdown(train_size=150, eval_size=100)
    puzzles = keys(task.train_dataset) + keys(task.eval_dataset)
    assert len(set(puzzles)) == len(puzzles) == 250


def test_countdown_prompt_tells_the_puzzle():
    for row in countdown(train_size=4, eval_size=1).train_dataset:
        system, user = row["prompt"]
        assert (system["role"], user["role"]) == ("system", "user")
        assert all(tag in system["content"] for tag in ("<think>", "</think>", "<answer>", "</answer>"))
        assert ", ".join(map(str, row["numbers"])) in user["content"]
        assert f"equals {row['target']}." in user["content"]


def test_countdown_seed():
    first, again, other = countdown(20, 20, seed=5), countdown(20, 20, seed=5), countdown(20, 20, seed=6)
    assert first.train_dataset.to_list() == again.train_dataset.to_list()
    assert first.eval_dataset.to_list() == again.eval_dataset.to_list()
    assert first.train_dataset.to_list() != other.train_dataset.to_list()
    assert first.eval_dataset.to_list() != other.eval_dataset.to_list()


def test_countdown_data_never_changes():
    # Published results name only a seed: the puzzles behind it must stay the same on every machine and version.
    assert keys(countdown(1, 2, seed=0).eval_dataset) == [((8, 34, 67), 41), ((12, 19, 58, 70), 19)]


def test_countdown_eval_split_does_not_depend_on_the_train_size():
    assert countdown(10, 20).eval_dataset.to_list() == countdown(30, 20).eval_dataset.to_list()


def test_countdown_is_quick():
    start = time.perf_counter()
    countdown(train_size=3000, eval_size=1000)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("make_task", [countdown, conciseness])
@pytest.mark.parametrize("name", ["train_size", "eval_size"])
@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_an_error(make_task, name, size):
    with pytest.raises(ValueError, match=rf"{name}={size} .*1"):
        make_task(**{name: size})


@pytest.mark.parametrize(("name", "size"), [("train_size", 49), ("eval_size", 17)])
def test_conciseness_sizes_above_the_number_of_questions_are_an_error(name, size):
    with pytest.raises(ValueError, match=rf"{name}={size} .*1 to {size - 1}"):
        conciseness(**{name: size})


def test_conciseness_questions_and_answers():
    task = conciseness()
    assert task.name == "conciseness"
    assert task.reward_funcs == [conciseness_reward]
    assert (len(task.train_dataset), len(task.eval_dataset)) == (48, 16)
    rows = [*task.train_dataset, *task.eval_dataset]
    assert list(rows[0]) == ["prompt", "answer"]
    for row in rows:
        (message,) = row["prompt"]
        assert message["role"] == "user"
        assert message["content"].endswith("?") and len(message["content"].split()) < 12
        assert row["answer"].endswith(".") and 1 <= len(row["answer"].split()) <= 4
    assert len({row["prompt"][0]["content"].lower() for row in rows}) == 64


def test_conciseness_seed_shuffles_train_only():
    first, again, other = conciseness(seed=1), conciseness(seed=1), conciseness(seed=2)
    assert first.train_dataset.to_list() == again.train_dataset.to_list()
    assert first.train_dataset.to_list() != other.train_dataset.to_list()
    assert sorted(first.train_dataset["answer"]) == sorted(other.train_dataset["answer"])
    assert first.eval_dataset.to_list() == other.eval_dataset.to_list()


def test_conciseness_sizes_take_the_first_questions():
    full, part = conciseness(seed=1), conciseness(train_size=5, eval_size=3, seed=1)
    assert part.train_dataset.to_list() == full.train_dataset.to_list()[:5]
    assert part.eval_dataset.to_list() == full.eval_dataset.to_list()[:3]


def test_task_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        conciseness().name = "other"


@pytest.mark.parametrize("task", [countdown(2, 2), conciseness(2, 2)], ids=lambda task: task.name)
def test_reward_functions_read_the_columns_of_their_task(task: Task):
    columns = {name: list(task.train_dataset[name]) for name in task.train_dataset.column_names}
    prompts = columns.pop("prompt")
    completions = [[{"role": "assistant", "content": "<think></think><answer></answer>"}]] * 2
    for reward_func in task.reward_funcs:
        assert len(reward_func(prompts=prompts, completions=completions, completion_ids=[[0]] * 2, **columns)) == 2
