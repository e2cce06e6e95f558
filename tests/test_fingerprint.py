import pytest
from conftest import make_model
from datasets import Dataset

from es_trainer.run import fingerprint


ROWS = [{"prompt": "a", "answer": 1.5, "tags": ["x"]}, {"prompt": "b", "answer": None, "tags": []}]


def content(rows) -> str:
    return fingerprint.of_data({"train_dataset": Dataset.from_list(rows)})


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:1],
        ROWS[::-1],
        [{**ROWS[0], "answer": 1.25}, ROWS[1]],
        [{**ROWS[0], "tags": ["y"]}, ROWS[1]],
        [{"text": row["prompt"], **{k: v for k, v in row.items() if k != "prompt"}} for row in ROWS],
    ],
    ids=["fewer", "another order", "another number", "another list", "another name"],
)
def test_other_data_have_another_content(rows):
    assert content(ROWS) == content([dict(row) for row in ROWS])
    assert content(rows) != content(ROWS)


def test_content_does_not_depend_on_how_a_dataset_was_made():
    shuffled = Dataset.from_list([ROWS[1], ROWS[0]]).select([1, 0])
    assert fingerprint.of_data({"train_dataset": shuffled}) == content(ROWS)


@pytest.mark.parametrize("config", [{"num_hidden_layers": 1}, {"tie": False}, {"hidden_size": 64}])
def test_other_models_differ(config):
    assert fingerprint.of_model(make_model(seed=1)) == fingerprint.of_model(make_model())
    assert fingerprint.of_model(make_model(**config)) != fingerprint.of_model(make_model())


def test_a_run_is_described_by_what_processes_must_share(config):
    facts = fingerprint.of_run(config(seed=7), ["letters"], {})
    assert facts["`seed`"] == 7 and facts["`max_steps`"] == 3 and facts["`reward_funcs`"] == ["letters"]
    assert facts["the version of torch"] and facts["the version of numba"]
    assert facts != fingerprint.of_run(config(seed=8), ["letters"], {})
