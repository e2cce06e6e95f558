import json

import pytest
from conftest import needs_reasoning_gym

from es_trainer.tasks import sudoku


pytestmark = needs_reasoning_gym


@pytest.fixture(scope="module")
def task():
    return sudoku(train_size=6, eval_size=3)


def test_rows(task):
    assert task.name == "sudoku"
    assert [reward.__name__ for reward in task.reward_funcs] == ["sudoku_reward"]
    assert (len(task.train_dataset), len(task.eval_dataset)) == (6, 3)
    puzzles = {
        prompt[-1]["content"] for split in (task.train_dataset, task.eval_dataset) for prompt in split["prompt"]
    }
    assert len(puzzles) == 9
    assert all(30 <= puzzle.count("_") <= 50 for puzzle in puzzles)


def test_other_numbers_of_empty_cells():
    (prompt,) = sudoku(3, 4, train_size=1, eval_size=1).train_dataset["prompt"]
    assert 3 <= prompt[-1]["content"].count("_") <= 4
    with pytest.raises(ValueError, match="'sudoku' refuses .*between min_empty and 64"):
        sudoku(max_empty=65)


def test_reward(task):
    (reward,) = task.reward_funcs
    entry = list(task.train_dataset["entry"])
    solutions = [json.loads(text)["answer"] for text in entry]
    assert reward([f"So: <answer>\n{solution}\n</answer>" for solution in solutions], entry) == [1.0] * 6
    eight_rows = [f"<answer>{solution[:-18]}</answer>" for solution in solutions]
    assert reward(eight_rows, entry) == pytest.approx([0.9 * 72 / 81] * 6)
    # The puzzle as it was has no row that counts, or only few
    puzzles = [prompt[-1]["content"] for prompt in task.train_dataset["prompt"]]
    assert max(reward([f"<answer>{puzzle}</answer>" for puzzle in puzzles], entry)) < 0.1
    assert reward(["", *solutions[1:]], entry) == [0.0] * 6
