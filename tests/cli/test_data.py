import json
import sys
from pathlib import Path

import pytest
from conftest import needs_reasoning_gym
from datasets import Dataset, IterableDataset
from trl import DatasetMixtureConfig
from trl.rewards import think_format_reward

from es_trainer.cli.eval import EvalArguments
from es_trainer.rewards import conciseness_reward, countdown_reward
from es_trainer.scripts.data import (
    ESScriptArguments,
    check_data,
    load_data,
    load_reward_funcs,
    pick_split,
    with_system_prompt,
)
from es_trainer.tasks import conciseness, reasoning_gym


METRIC = Path(__file__).with_name("same_text.py")
NO_MIXTURE = DatasetMixtureConfig()
ROWS = [{"prompt": f"Say {word}", "answer": word} for word in ("one", "two", "three")]
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working directory."""
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(completions, **kwargs):\n    return [1.0] * len(completions)\n"
    )
    (tmp_path / "my_broken_rewards.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_rewards", None)


def load(mixture=NO_MIXTURE, **options):
    arguments = ESScriptArguments(**options)
    check_data(arguments, mixture)
    return load_data(arguments, mixture)


def refusal(mixture=NO_MIXTURE, **options) -> str:
    with pytest.raises(ValueError) as error:
        check_data(ESScriptArguments(**options), mixture)
    return str(error.value)


def test_a_task_brings_both_splits_and_rewards():
    splits, rewards = load(task="conciseness")
    assert splits["train"].to_list() == conciseness().train_dataset.to_list()
    assert splits["test"].to_list() == conciseness().eval_dataset.to_list()
    assert rewards == [conciseness_reward]


def test_other_rewards_take_the_place_of_a_tasks():
    _, rewards = load(task="conciseness", reward_funcs=["think_format_reward"], reward_model_name_or_path="a/model")
    assert rewards == ["a/model", think_format_reward]
    assert load(task="conciseness", reward_model_name_or_path="a/model")[1] == ["a/model"]


def test_a_tasks_rows_come_from_the_dataset_that_is_named(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": f"{split}?", "answer": "so #### 3"}))
    splits, _ = load(task="gsm8k", dataset_name=str(tmp_path))
    assert splits["train"][0]["prompt"][-1]["content"] == "train?"
    assert splits["test"][0]["prompt"][-1]["content"] == "test?"


@pytest.mark.parametrize("option", ["dataset_name", "dataset_config"])
def test_a_task_that_makes_its_rows_takes_no_dataset(option):
    message = refusal(task="countdown", **{option: "mine"})
    assert f"`{option}='mine'` has no meaning for `task='countdown'`" in message


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_from_a_file(jsonl, streaming):
    splits, rewards = load(dataset_name=str(jsonl), dataset_streaming=streaming, reward_funcs=["countdown_reward"])
    assert list(splits["train"]) == ROWS
    assert isinstance(splits["train"], IterableDataset if streaming else Dataset)
    assert rewards == [countdown_reward]


def test_a_dataset_from_a_parquet_file_in_the_working_directory(jsonl, monkeypatch):
    load(dataset_name=str(jsonl), reward_funcs=["countdown_reward"])[0]["train"].to_parquet(
        jsonl.with_suffix(".parquet")
    )
    monkeypatch.chdir(jsonl.parent)
    assert list(load(dataset_name="rows.parquet", reward_funcs=["countdown_reward"])[0]["train"]) == ROWS


def test_a_dataset_from_a_folder(jsonl):
    jsonl.rename(jsonl.with_name("test.jsonl"))
    splits, _ = load(dataset_name=str(jsonl.parent), reward_funcs=["countdown_reward"])
    assert list(splits["test"]) == ROWS


def test_a_mixture(jsonl):
    mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": str(jsonl)}] * 2, test_split_size=0.5)
    splits, _ = load(mixture, reward_funcs="countdown_reward")
    assert len(splits["train"]) == len(splits["test"]) == 3
    assert "leave out one" in refusal(mixture, task="conciseness")
    assert "leave out one" in refusal(mixture, dataset_name="mine")


def test_a_split_that_does_not_exist(jsonl):
    splits, _ = load(dataset_name=str(jsonl), reward_funcs=["countdown_reward"])
    with pytest.raises(ValueError, match="`dataset_test_split='test'`: the dataset has the splits 'train'"):
        pick_split(splits, "dataset_test_split", "test")


def test_system_prompts(jsonl):
    splits, _ = load(dataset_name=str(jsonl), reward_funcs=["countdown_reward"], system_prompt="Be brief.")
    assert list(splits["train"]["prompt"]) == [f"Be brief.\n\n{row['prompt']}" for row in ROWS]
    splits, _ = load(task="countdown", system_prompt="Be brief.")
    for prompt in splits["test"]["prompt"]:
        assert prompt[0] == {"role": "system", "content": "Be brief."}
        assert [message["role"] for message in prompt] == ["system", "user"]
    assert with_system_prompt(CHAT, "Be brief.") == [{"role": "system", "content": "Be brief."}, *CHAT]


def test_nothing_to_load():
    assert "`task` (arc, conciseness, count_shapes, countdown," in refusal()
    assert "set `reward_funcs` (ready-made: " in refusal(dataset_name="mine")
    assert "`reward_funcs`" in refusal(DatasetMixtureConfig(datasets=[{"path": "mine"}]))


def test_an_unknown_task_is_an_error_that_names_the_nearest():
    message = refusal(task="countdwn")
    assert message.startswith("`task='countdwn'` is not one of arc, conciseness, count_shapes, countdown,")
    assert message.endswith(": did you mean 'countdown'?")


@needs_reasoning_gym
def test_a_task_with_an_argument():
    splits, (reward,) = load(task="reasoning_gym:mini_sudoku")
    assert splits["train"].to_list() == reasoning_gym("mini_sudoku").train_dataset.to_list()
    assert splits["test"].to_list() == reasoning_gym("mini_sudoku").eval_dataset.to_list()
    assert reward.__name__ == "mini_sudoku_reward"
    with pytest.raises(ValueError, match="no generator 'mini_sudoko': did you mean 'mini_sudoku'"):
        load(task="reasoning_gym:mini_sudoko")


@pytest.mark.parametrize("task", ["reasoning_gym", "reasoning_gym:"])
def test_a_task_without_its_argument(task):
    message = f"`task={task!r}` does not say which generator: set `task` to 'reasoning_gym:NAME'."
    assert refusal(task=task) == message


@pytest.mark.parametrize("task", ["countdown:", "countdown:3"])
def test_a_task_that_takes_no_argument(task):
    assert refusal(task=task).endswith("'countdown' takes nothing after it: set `task` to 'countdown'.")


def test_an_unknown_task_with_an_argument():
    assert refusal(task="reasoning_gmy:mini_sudoku").endswith(": did you mean 'reasoning_gym'?")


def test_an_unknown_reward_is_an_error_that_names_the_nearest():
    message = refusal(task="countdown", reward_funcs=["countdown_rewrad"])
    assert message.startswith("`reward_funcs` has 'countdown_rewrad', which is neither one of accuracy_reward,")
    assert message.endswith(": did you mean 'countdown_reward'?")


def test_rewards_by_name():
    names = ["conciseness_reward", "think_format_reward", "reasoning_accuracy_reward", "get_soft_overlong_punishment"]
    rewards = load_reward_funcs(names)
    assert [reward.__name__ for reward in rewards[:3]] == names[:3]
    assert rewards[3](completion_ids=[[0] * 1024, [0] * 1152, [0] * 1281]) == [0.0, -0.5, -1.0]


def test_a_reward_from_the_working_directory(module):
    (reward,) = load_reward_funcs(["my_rewards.brevity"])
    assert reward(completions=["a", "b"]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_reward.brevity", "no module 'my_reward'"),
        ("my_rewards.deep.brevity", "no module 'my_rewards.deep'"),
        ("my_rewards.brevty", "has no 'brevty': did you mean 'brevity'?"),
    ],
)
def test_a_dotted_path_that_leads_nowhere(module, path, message):
    with pytest.raises(ValueError) as error:
        load_reward_funcs([path])
    assert f"`reward_funcs` has {path!r}" in str(error.value)
    assert message in str(error.value)


def test_an_import_that_fails_inside_of_a_module_is_not_hidden(module):
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_reward_funcs(["my_broken_rewards.brevity"])


def test_metrics_of_evaluate():
    exact, count = load_reward_funcs([f"evaluate:{METRIC}", f"evaluate:{METRIC}:same"])
    for reward in (exact, count):
        assert reward.__name__ == "same_text"
        assert reward(completions=["a", "b"], answer=["a", "c"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="score='bleu'"):
        load_reward_funcs([f"evaluate:{METRIC}:bleu"])[0](completions=["a"], answer=["a"])


def test_arguments_of_a_metric_stand_behind_it():
    name = f"evaluate:{METRIC}:same,scope=member,reference_column=label,postprocess=textwrap.dedent"
    (reward,) = load_reward_funcs([name])
    assert reward.reward_scope == "member"
    assert reward(completions=[" A", " b", "c"], label=["A", "b", "d"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="'average' is not `key=value`. Write arguments of .*average=macro"):
        load_reward_funcs([f"evaluate:{METRIC},average"])


@pytest.mark.parametrize("arguments", [ESScriptArguments, lambda **options: EvalArguments("model", **options)])
def test_one_reward_in_yaml_without_brackets(arguments):
    assert arguments(reward_funcs="think_format_reward").reward_funcs == ["think_format_reward"]
