import json
import threading

import pytest

from es_trainer import tasks
from es_trainer.tasks import boxed, gsm8k


ROWS = [
    {"question": "Three boxes of 14 pens?", "answer": "3 * 14 = <<3*14=42>>42 #### of course\n#### 42"},
    {"question": "1,000 and 234 sheep?", "answer": "Add.\n#### 1,234"},
    {"question": "Five degrees colder than 0?", "answer": "Below.\n#### -5"},
    {"question": "Half of 5?", "answer": "Halve.\n#### 2.5"},
    {"question": "Two hands, how many fingers?", "answer": "2 * 5.\n#### 10"},
]
SOLUTIONS = [r"\boxed{42}", r"\boxed{1234}", r"\boxed{-5}", r"\boxed{2.5}", r"\boxed{10}"]


def write(folder, **splits):
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path, train=ROWS, test=ROWS[::-1])


def test_questions_and_answers(folder):
    task = gsm8k(folder)
    assert task.name == "gsm8k"
    assert task.train_dataset.column_names == task.eval_dataset.column_names == ["prompt", "solution"]
    assert task.eval_dataset["solution"] == SOLUTIONS[::-1]
    assert sorted(task.train_dataset["solution"]) == sorted(SOLUTIONS)
    for row in task.train_dataset:
        system, user = row["prompt"]
        assert system["role"] == "system" and r"\boxed{}" in system["content"]
        assert user["role"] == "user"
        (question,) = [r["question"] for r, s in zip(ROWS, SOLUTIONS, strict=True) if s == row["solution"]]
        assert user["content"] == question


def test_reward_in_a_background_thread(folder):
    # There TRL's own reward goes without time limits, as they need the main thread
    task = gsm8k(folder)
    solution = list(task.eval_dataset["solution"])
    right = [[{"role": "assistant", "content": rf"So it is ${text}$."}] for text in solution]
    wrong = [[{"role": "assistant", "content": r"\boxed{7}"}] for _ in solution]
    bare = [[{"role": "assistant", "content": "42"}] for _ in solution]
    (reward,) = task.reward_funcs
    results = []
    thread = threading.Thread(target=lambda: results.extend(reward(c, solution) for c in (right, wrong, bare)))
    thread.start()
    thread.join()
    assert results == [[1.0] * 5, [0.0] * 5, [0.0] * 5]


@pytest.mark.parametrize(
    "written", [r"\boxed{1234}", r"\boxed{1,234}", r"\boxed{\$1234}", r"\boxed{1234\text{ sheep}}"]
)
def test_ways_to_write_a_number(written, folder):
    assert gsm8k(folder).reward_funcs[0]([written], [SOLUTIONS[1]]) == [1.0]


def test_seed_shuffles_train_only(folder):
    first, again, other = gsm8k(folder, seed=1), gsm8k(folder, seed=1), gsm8k(folder, seed=2)
    assert first.train_dataset.to_list() == again.train_dataset.to_list()
    assert first.train_dataset.to_list() != other.train_dataset.to_list()
    assert first.eval_dataset.to_list() == other.eval_dataset.to_list()


def test_sizes_take_the_first_problems(folder):
    full, part = gsm8k(folder, seed=1), gsm8k(folder, train_size=3, eval_size=2, seed=1)
    assert part.train_dataset.to_list() == full.train_dataset.to_list()[:3]
    assert part.eval_dataset.to_list() == full.eval_dataset.to_list()[:2]


@pytest.mark.parametrize("option", ["train_size", "eval_size"])
@pytest.mark.parametrize("size", [-1, 0, 6])
def test_impossible_sizes_are_an_error(folder, option, size):
    with pytest.raises(ValueError, match=f"{option}={size} .*5 problems"):
        gsm8k(folder, **{option: size})


def test_a_missing_column_is_an_error(tmp_path):
    rows = [{"question": "?", "result": "1"}]
    with pytest.raises(ValueError, match="no column 'answer' in the split 'train', only 'question', 'result'"):
        gsm8k(write(tmp_path, train=rows, test=rows))


def test_a_missing_split_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no split 'test', only 'train'.*test\.jsonl"):
        gsm8k(write(tmp_path, train=ROWS))


def test_what_is_loaded_from_the_hub(monkeypatch, folder):
    asked = []
    load_dataset = boxed.load_dataset
    monkeypatch.setattr(boxed, "load_dataset", lambda *args: asked.append(args) or load_dataset(folder))
    gsm8k()
    gsm8k(dataset_config="socratic")
    gsm8k("someone/gsm8k")
    assert asked == [("openai/gsm8k", "main"), ("openai/gsm8k", "socratic"), ("someone/gsm8k", None)]


def test_without_math_verify(monkeypatch, folder):
    monkeypatch.setattr(boxed, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="'gsm8k' .*pip install math-verify"):
        gsm8k(folder)


def test_the_command_line_finds_it():
    assert "gsm8k" in tasks.__all__ and tasks.gsm8k is gsm8k
