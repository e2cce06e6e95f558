"""What the quickstart says to do next. tests/test_real_model.py runs all of it."""

import re
import runpy
import textwrap
from pathlib import Path

import pytest
from conftest import logs

from es_trainer.tasks import conciseness


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def advice() -> str:
    return runpy.run_path(str(ROOT / "examples" / "quickstart.py"))["NEXT"]


def test_its_reward_works_on_its_data(advice, trainer):
    (code,) = re.findall(r"^ +def .*?(?=\n\n)", advice, flags=re.M | re.S)
    assert len(code.splitlines()) <= 5
    names = {}
    exec(textwrap.dedent(code), names)
    reward = names["right_and_brief"]
    answers = [[{"role": "assistant", "content": text}] for text in ("It is paris!", "It is Rome!")]
    assert reward(completions=answers, prompts=None, answer=["Paris.", "Paris."]) == [100 - 12, -11]
    run = trainer(reward_funcs=reward, train_dataset=conciseness().train_dataset, eval_dataset=None)
    run.train()
    assert all(log["reward"] < 0 for log in logs(run)) and len(logs(run)) == 3


def test_the_files_that_it_names_are_there(advice):
    files = re.findall(r"[\w/]+\.(?:md|ipynb)", advice)
    assert len(files) == 7 and all((ROOT / file).is_file() for file in files)
