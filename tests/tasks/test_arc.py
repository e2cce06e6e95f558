import json

import pytest
from conftest import needs_reasoning_gym

from es_trainer.tasks import arc


pytestmark = needs_reasoning_gym


@pytest.fixture(scope="module")
def task():
    return arc()


def questions(dataset) -> list[str]:
    return [prompt[-1]["content"] for prompt in dataset["prompt"]]


def ids(dataset) -> set[str]:
    return {json.loads(entry)["metadata"]["task_id"] for entry in dataset["entry"]}


def test_rows(task):
    assert task.name == "arc"
    assert [reward.__name__ for reward in task.reward_funcs] == ["arc_reward"]
    assert (len(task.train_dataset), len(task.eval_dataset)) == (191, 89)
    assert not ids(task.train_dataset) & ids(task.eval_dataset)
    both = questions(task.train_dataset) + questions(task.eval_dataset)
    assert len(set(both)) == len(both)
    assert max(map(len, both)) < 3100


def test_a_puzzle(task):
    """In 25ff71a9, a shape falls by one row. There are two grids to find."""
    rows = [row for row in task.train_dataset if '"25ff71a9"' in row["entry"]]
    for row in rows:
        system, user = row["prompt"]
        assert "<answer>" in system["content"]
        assert "Example 1:\n\nInput:\n1 1 1\n0 0 0\n0 0 0\nOutput:\n0 0 0\n1 1 1\n0 0 0\n" in user["content"]
        shape = user["content"].rpartition("Input:\n")[2].split("\n")
        assert json.loads(row["entry"])["answer"].split("\n") == ["0 0 0", *shape[:2]]
    assert len(rows) == 2


def test_all_puzzles():
    task = arc(largest_grid=30)
    assert (len(task.train_dataset), len(task.eval_dataset)) == (416, 419)
    assert (len(ids(task.train_dataset)), len(ids(task.eval_dataset))) == (400, 400)


def test_reward(task):
    (reward,) = task.reward_funcs
    entry = list(task.eval_dataset["entry"])
    answers = [json.loads(text)["answer"] for text in entry]
    assert reward([f"<answer>\n{answer}\n</answer>" for answer in answers], entry) == [1.0] * 89
    assert reward([f"<answer>{answer}\n1</answer>" for answer in answers], entry) == [0.05] * 89
    assert reward(["<answer>a grid</answer>"] * 89, entry) == reward(answers, entry) == [0.0] * 89


def test_seed_shuffles_train_only():
    first, again, other = arc(5, seed=1), arc(5, seed=1), arc(5, seed=2)
    assert first.train_dataset.to_list() == again.train_dataset.to_list()
    assert first.train_dataset.to_list() != other.train_dataset.to_list()
    assert sorted(questions(first.train_dataset)) == sorted(questions(other.train_dataset))
    assert first.eval_dataset.to_list() == other.eval_dataset.to_list()


def test_sizes_take_the_first_puzzles():
    full, part = arc(5, seed=1), arc(5, train_size=3, eval_size=2, seed=1)
    assert part.train_dataset.to_list() == full.train_dataset.to_list()[:3]
    assert part.eval_dataset.to_list() == full.eval_dataset.to_list()[:2]


@pytest.mark.parametrize("option", ["train_size", "eval_size"])
@pytest.mark.parametrize("size", [-1, 0, 500])
def test_impossible_sizes_are_an_error(option, size):
    with pytest.raises(ValueError, match=rf"{option}={size} .*\d+ puzzles .*largest_grid=10"):
        arc(**{option: size})


def test_no_puzzle_of_this_size_is_an_error():
    with pytest.raises(ValueError, match="train_size=None .* 0 puzzles .*largest_grid=1"):
        arc(1)
