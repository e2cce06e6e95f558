import json
import os
import subprocess
import sys

import pytest
from datasets import Dataset

from es_trainer.tasks import arc, reasoning_gym, sudoku
from es_trainer.tasks.reasoning_gym import RUN_THE_ANSWER


pytest.importorskip("reasoning_gym", reason="its dependency pycosat was not compiled")

from reasoning_gym.composite import DatasetSpec
from reasoning_gym.utils import SYSTEM_PROMPTS


def questions(dataset: Dataset) -> list[str]:
    return [prompt[-1]["content"] for prompt in dataset["prompt"]]


def grid(lines: str) -> list[list[int]]:
    return [[int(cell) for cell in line.split()] for line in lines.splitlines()]


def test_rows():
    task = reasoning_gym("mini_sudoku", train_size=20, eval_size=10)
    assert task.name == "reasoning_gym:mini_sudoku"
    assert [reward.__name__ for reward in task.reward_funcs] == ["mini_sudoku_reward"]
    assert (len(task.train_dataset), len(task.eval_dataset)) == (20, 10)
    for row in [*task.train_dataset, *task.eval_dataset]:
        assert list(row) == ["prompt", "entry"]
        system, user = row["prompt"]
        assert system == {"role": "system", "content": SYSTEM_PROMPTS["default"]}
        assert "<answer>" in system["content"]
        assert user["role"] == "user" and user["content"] == json.loads(row["entry"])["question"]
        assert "4x4" in user["content"]


def test_right_and_wrong_answers():
    task = reasoning_gym("mini_sudoku", 20, 10)
    (reward,) = task.reward_funcs
    for dataset in (task.train_dataset, task.eval_dataset):
        entry = list(dataset["entry"])
        solutions = [json.loads(text)["answer"] for text in entry]
        for solution in solutions:
            cells = grid(solution)
            boxes = [[cells[r + i][c + j] for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
            assert all(sorted(group) == [1, 2, 3, 4] for group in (*cells, *zip(*cells, strict=True), *boxes))
        wrong = [solution[:-1] + str(int(solution[-1]) % 4 + 1) for solution in solutions]
        assert reward([f"<answer>{solution}</answer>" for solution in solutions], entry) == [1.0] * len(entry)
        assert all(0.5 < points < 1 for points in reward([f"<answer>{text}</answer>" for text in wrong], entry))
        assert reward(solutions, entry) == [0.0] * len(entry)


def test_seed():
    first, again, other = (reasoning_gym("chain_sum", 20, 20, seed=seed) for seed in (5, 5, 6))
    for split in ("train_dataset", "eval_dataset"):
        assert getattr(first, split).to_list() == getattr(again, split).to_list()
        assert not set(questions(getattr(first, split))) & set(questions(getattr(other, split)))


def test_the_evaluation_split_does_not_depend_on_the_train_size():
    assert (
        reasoning_gym("leg_counting", 5, 8).eval_dataset.to_list()
        == reasoning_gym("leg_counting", 9, 8).eval_dataset.to_list()
    )


def test_questions_are_distinct_within_and_across_splits():
    # So few questions that repetitions are certain to come up
    task = reasoning_gym("gcd", 25, 15, min_value=1, max_value=10)
    both = questions(task.train_dataset) + questions(task.eval_dataset)
    assert len(set(both)) == len(both) == 40


@pytest.mark.parametrize(("sizes", "option"), [((9, 300), "eval_size=300"), ((300, 9), "train_size=300")])
def test_too_few_questions_are_an_error(sizes, option):
    with pytest.raises(ValueError, match=f"{option} is not possible: of 3000 questions .* only"):
        reasoning_gym("gcd", *sizes, min_value=1, max_value=10)


@pytest.mark.parametrize("name", ["train_size", "eval_size"])
@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_an_error(name, size):
    with pytest.raises(ValueError, match=rf"{name}={size} .*1"):
        reasoning_gym("leg_counting", **{name: size})


# Generators that make no more than their size, whose items depend on their size, whose entries are not plain JSON
@pytest.mark.parametrize("name", ["list_functions", "acre", "gsm_symbolic", "rearc", "graph_color"])
def test_other_generators(name):
    task = reasoning_gym(name, 6, 3)
    assert len(set(questions(task.train_dataset) + questions(task.eval_dataset))) == 9
    (points,) = task.reward_funcs[0](["<answer></answer>"], task.eval_dataset["entry"][:1])
    assert 0.0 <= points < 1.0


def test_a_composite():
    parts = [DatasetSpec("chain_sum", 1, {"min_terms": 2, "max_terms": 2}), DatasetSpec("leg_counting", 1, {})]
    task = reasoning_gym("composite", 12, 6, datasets=parts)
    entry = list(task.train_dataset["entry"])
    answers = [f"<answer>{json.loads(text)['answer']}</answer>" for text in entry]
    assert task.reward_funcs[0](answers, entry) == [1.0] * 12
    with pytest.raises(ValueError, match="'n_queens' is refused"):
        reasoning_gym("composite", datasets=[*parts, DatasetSpec("n_queens", 1, {})])


def test_an_unknown_generator_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="no generator 'mini_sudoko': did you mean 'mini_sudoku'"):
        reasoning_gym("mini_sudoko")
    with pytest.raises(ValueError, match="no generator 'mini-sudoku': did you mean 'mini_sudoku'"):
        reasoning_gym("mini-sudoku")
    with pytest.raises(ValueError, match="no generator '!': it has .*mini_sudoku, .*sudoku, "):
        reasoning_gym("!")


@pytest.mark.parametrize("name", sorted(RUN_THE_ANSWER))
def test_generators_that_would_run_what_the_model_wrote_are_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' is refused, .*as Python code"):
        reasoning_gym(name)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"min_empyt": 4}, "min_empyt"),
        ({"min_empty": 40}, "min_empty must be between 0 and 12"),
        ({"size": 4}, "size"),
    ],
)
def test_a_configuration_that_the_generator_refuses(config, reason):
    with pytest.raises(ValueError, match=f"'mini_sudoku' refuses .*{reason}.* It has min_empty, max_empty."):
        reasoning_gym("mini_sudoku", **config)


@pytest.mark.parametrize("make_task", [lambda: reasoning_gym("mini_sudoku"), sudoku, arc])
def test_without_reasoning_gym(make_task, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"needs reasoning-gym: `pip install 'es-trainer\[tasks\]'`"):
        make_task()


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_rows_are_the_same_in_every_process(hash_seed):
    code = "import json; from es_trainer.tasks import sudoku; print(json.dumps(sudoku(train_size=2, eval_size=1)"
    code += ".train_dataset.to_list()))"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert json.loads(output) == sudoku(train_size=2, eval_size=1).train_dataset.to_list()
