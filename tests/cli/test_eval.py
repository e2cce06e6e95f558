import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, save_tiny
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from es_trainer import ESTrainer, replay_top_members
from es_trainer.cli import main
from es_trainer.cli.eval import EvalArguments, evaluate, majority_of, mean_and_error
from es_trainer.rollout import Completion, Generations
from es_trainer.tasks import conciseness


METRIC = Path(__file__).with_name("same_text.py")
WORDS = "one two three four five six".split()
REWARDS = """
from es_trainer.rewards import per_member


@per_member
def count(completions, **kwargs):
    return len(completions)


def letters(prompts, completions, **kwargs):
    return [sum(map(str.islower, completion)) for completion in completions]


def is_message(completions, **kwargs):
    return [float(completion[0]["role"] == "assistant") for completion in completions]


def of_two(prompts, completions, **kwargs):
    return [1.0 if prompt.endswith("two") else None for prompt in prompts]


def first_letter(completion):
    return completion[:1]


def solve(example, endpoint):
    import openai

    with openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:
        messages = [{"role": "user", "content": example["question"]}]
        reply = client.chat.completions.create(model=endpoint.model, messages=messages)
    return {"reward": float(len(reply.choices[0].message.content)), "asked": endpoint.model}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a dataset of texts and a module of reward functions."""
    folder = tmp_path_factory.mktemp("eval")
    rows = [{"prompt": f"Say {word}", "answer": word} for word in WORDS]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_eval_rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def arguments(model_folder):
    def make(**options) -> EvalArguments:
        data = {"dataset_name": "words.jsonl", "reward_funcs": ["my_eval_rewards.letters"]}
        if "task" in options:
            data = {}
        defaults = {"model_name_or_path": model_folder, "use_cpu": True, "max_completion_length": 8}
        return EvalArguments(**{**defaults, **data, **options})

    return make


SAMPLED = {"temperature": 1.0, "num_samples": 5}


def completions(results) -> list[list[str]]:
    return [row["completions"] for row in results.rows]


def test_greedy_scores_are_those_of_the_trainer(arguments, model_folder, config):
    task = conciseness()
    (results,) = evaluate(arguments(task="conciseness"))
    trainer = ESTrainer(
        model_folder, task.reward_funcs, config(), train_dataset=task.train_dataset, eval_dataset=task.eval_dataset
    )
    expected = trainer.evaluate()
    for name in ("reward", "completions/mean_length", "completions/clipped_ratio"):
        assert mean_and_error(results.by_prompt[name])[0] == pytest.approx(expected[f"eval_{name}"])
    assert results.by_prompt["rewards/conciseness_reward"].tolist() == results.by_prompt["reward"].tolist()
    assert [row["prompt"] for row in results.rows] == list(task.eval_dataset["prompt"])


def test_rewards_get_messages_for_messages(arguments):
    (results,) = evaluate(arguments(task="conciseness", reward_funcs=["my_eval_rewards.is_message"]))
    assert set(results.by_prompt["reward"]) == {1.0}


def test_report_and_table(arguments, model_folder, other_model, tmp_path, capsys):
    output = tmp_path / "new" / "report.json"
    argv = ["--model_name_or_path", other_model, "--compare_to", model_folder, "--dataset_name", "words.jsonl"]
    rewards = ["--reward_funcs", "my_eval_rewards.letters", f"evaluate:{METRIC}", "--reward_weights", "2", "10"]
    argv += [*rewards, "--temperature", "1", "--num_samples", "3", "--max_completion_length", "8", "--use_cpu"]
    assert main(["eval", *argv, "--pass_threshold", "2", "--output", str(output)]) == 0
    report = json.loads(output.read_text())

    assert report["settings"]["num_samples"] == 3
    assert report["versions"]["torch"] == version("torch")
    assert [model["model"] for model in report["models"]] == [model_folder, other_model]
    totals = []
    for model in report["models"]:
        assert [row["prompt"] for row in model["rows"]] == [f"Say {word}" for word in WORDS]
        letters = [[sum(map(str.islower, text)) for text in row["completions"]] for row in model["rows"]]
        assert [row["rewards"]["letters"] for row in model["rows"]] == letters
        same = [row["rewards"]["same_text"] for row in model["rows"]]
        total = 2 * np.array(letters) + 10 * np.array(same)
        assert [row["reward"] for row in model["rows"]] == total.tolist()
        reward = model["metrics"]["reward"]
        assert reward["mean"] == pytest.approx(total.mean())
        assert reward["standard_error"] == pytest.approx(total.mean(axis=1).std(ddof=1) / np.sqrt(6))
        assert model["metrics"]["pass@1"]["mean"] == pytest.approx((total >= 2).mean())
        assert model["metrics"]["pass@3"]["mean"] == pytest.approx((total >= 2).any(axis=1).mean())
        totals.append(total.mean(axis=1))
    difference = report["difference"]["reward"]
    assert difference["mean"] == pytest.approx((totals[1] - totals[0]).mean())
    assert difference["standard_error"] == pytest.approx((totals[1] - totals[0]).std(ddof=1) / np.sqrt(6))

    printed = capsys.readouterr().out
    assert "6 prompts: mean ± standard error" in printed
    assert "A completion passes with a reward of 2 or more." in printed
    for name in ("rewards/letters", "rewards/same_text", "pass@1", "pass@2", "pass@3", "difference"):
        assert name in printed
    assert f"{difference['mean']:.4g} ± {difference['standard_error']:.2g}" in printed


def test_samples_do_not_hang_on_the_batch_size(arguments):
    (one_by_one,) = evaluate(arguments(**SAMPLED, batch_size=1))
    (together,) = evaluate(arguments(**SAMPLED))
    assert completions(one_by_one) == completions(together)
    assert len(set(completions(together)[0])) > 1
    (others,) = evaluate(arguments(**SAMPLED, seed=1))
    assert completions(others) != completions(together)


def test_models_share_random_numbers(arguments, model_folder):
    before, after = evaluate(arguments(**SAMPLED, compare_to=model_folder))
    assert completions(before) == completions(after)


def test_a_reward_of_a_whole_set_gets_all_completions(arguments):
    (results,) = evaluate(arguments(reward_funcs=["my_eval_rewards.count"], batch_size=2))
    assert set(results.by_prompt["reward"]) == {len(WORDS)}


def test_k_of_many_samples(arguments):
    (results,) = evaluate(arguments(**{**SAMPLED, "num_samples": 6}, pass_threshold=3.0))
    assert [name for name in results.by_prompt if name.startswith("pass@")] == ["pass@1", "pass@2", "pass@4", "pass@6"]
    means = [results.by_prompt[f"pass@{k}"].mean() for k in (1, 2, 4, 6)]
    assert means == sorted(means)
    assert 0 < means[0] < means[-1]


def test_the_threshold_itself_passes(arguments):
    (results,) = evaluate(arguments(pass_threshold=2.0))
    rewards = results.by_prompt["reward"]
    assert {1.0, 2.0} <= set(rewards)
    assert results.by_prompt["pass@1"].tolist() == (rewards >= 2.0).tolist()


def test_rewards_that_do_not_apply(arguments, tmp_path):
    (results,) = evaluate(arguments(reward_funcs=["my_eval_rewards.of_two"]))
    assert [row["reward"] for row in results.rows] == [[None], [1.0], [None], [None], [None], [None]]
    assert mean_and_error(results.by_prompt["reward"])[0] == 1.0
    assert results.by_prompt["pass@1"].tolist() == [0, 1, 0, 0, 0, 0]


def test_mean_and_error():
    assert mean_and_error(np.array([1.0, np.nan, 3.0])) == (2.0, 1.0)
    mean, error = mean_and_error(np.array([np.nan, 3.0]))
    assert mean == 3.0 and np.isnan(error)
    assert np.isnan(mean_and_error(np.array([np.nan]))).all()


def test_limit(arguments):
    for streaming in (False, True):
        (results,) = evaluate(arguments(limit=2, dataset_streaming=streaming))
        assert [row["prompt"] for row in results.rows] == ["Say one", "Say two"]


def test_splits(arguments, tmp_path):
    for split in ("train", "test"):
        Dataset.from_list([{"prompt": split}]).to_json(tmp_path / f"{split}.jsonl")
    name = str(tmp_path)
    assert evaluate(arguments(dataset_name=name))[0].rows[0]["prompt"] == "test"
    assert evaluate(arguments(dataset_name=name, dataset_split="train"))[0].rows[0]["prompt"] == "train"
    with pytest.raises(ValueError, match="`dataset_split='validation'`: the dataset has the splits 'train', 'test'"):
        evaluate(arguments(dataset_name=name, dataset_split="validation"))


def test_an_adapter(arguments, model_folder, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.base_model.model.config._name_or_path = model.peft_config["default"].base_model_name_or_path = model_folder
    model.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    make_tokenizer().save_pretrained(tmp_path / "merged")
    adapter, merged, base = str(tmp_path / "adapter"), str(tmp_path / "merged"), model_folder
    merged, adapter = evaluate(arguments(model_name_or_path=adapter, compare_to=merged))
    assert completions(adapter) == completions(merged)
    assert completions(adapter) != completions(evaluate(arguments(model_name_or_path=base))[0])


def test_a_reward_model(arguments, tmp_path):
    from transformers import LlamaForSequenceClassification

    config = make_model().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (results,) = evaluate(arguments(reward_model_name_or_path=str(tmp_path), reward_funcs=None))
    assert len(set(results.by_prompt["reward"])) > 1


def test_settings_that_cannot_work(arguments):
    with pytest.raises(ValueError, match="`num_samples=4`: greedy decoding"):
        arguments(num_samples=4)
    with pytest.raises(ValueError, match="`num_samples=0`"):
        arguments(num_samples=0)
    with pytest.raises(ValueError, match="`limit=0`"):
        arguments(limit=0)
    with pytest.raises(ValueError, match="set `task`"):
        evaluate(arguments(dataset_name=None))


def test_a_dataset_without_prompts(arguments, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match=r"no column 'prompt'; its columns are \['question'\]"):
        evaluate(arguments(dataset_name=str(path)))


def test_an_unknown_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--model_name_or_path", "x", "--num_sample", "3"])
    assert "unknown option '--num_sample': did you mean '--num_samples'?" in capsys.readouterr().err


def test_a_program_asks_the_model(folder, model_folder, capsys):
    rows = [{"question": f"Say {word}"} for word in WORDS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--agent", "my_eval_rewards.solve", "--dataset_name", "questions.jsonl", "--max_completion_length", "8"]
    options += ["--model_name_or_path", model_folder, "--use_cpu", "--output", "agent.json"]
    main(["eval", *options])
    (report,) = json.loads((folder / "agent.json").read_text())["models"]
    for row, question in zip(report["rows"], rows, strict=True):
        assert row["prompt"] == [{"role": "user", "content": question["question"]}]
        assert row["reward"] == [float(len(row["completions"][0]))]
    with pytest.raises(SystemExit) as exit:
        main(["eval", *options, "--agent", "my_eval_rewards.solved"])
    assert exit.value.code == 2
    assert "`agent` has 'my_eval_rewards.solved'" in capsys.readouterr().err


# ---- ensembles ----


@pytest.fixture
def ensemble(model_folder, dataset, reward, config, tmp_path) -> str:
    """A model with its three best members."""
    args = config(perturbation="low_rank", sigma=0.3, max_steps=1)
    ESTrainer(model_folder, reward, args, train_dataset=dataset).train()
    replay_top_members(model_folder, tmp_path / "run", 3, tmp_path / "ensemble")
    for folder in ("ensemble", "ensemble/member-1", "ensemble/member-2", "ensemble/member-3"):
        make_tokenizer().save_pretrained(tmp_path / folder)
    return str(tmp_path / "ensemble")


def answers(*texts: str) -> list[Completion]:
    return [Completion([1], text, False) for text in texts]


def test_the_answer_that_most_members_give_counts_and_of_several_that_of_the_better_member():
    members = [answers("a", "a", " b", "a 1"), answers("b", "b", "c", "b 2"), answers("b", "c", "b ", "b 3")]
    assert majority_of(members, "Say", Generations("majority")) == answers("b", "a", " b", "a 1")
    by_letter = Generations("majority", lambda text: text[0])
    assert majority_of(members, "Say", by_letter) == answers("b", "a", " b", "b 2")
    conversation = [{"role": "user", "content": "Say"}]
    by_message = Generations("majority", lambda messages: messages[-1]["content"][0])
    assert majority_of(members, conversation, by_message) == answers("b", "a", " b", "b 2")


def test_an_ensemble_beside_its_best_member_and_the_center(arguments, ensemble, model_folder):
    options = {"model_name_or_path": ensemble, "temperature": 1.0, "num_samples": 2}
    alone = [evaluate(arguments(**{**options, "model_name_or_path": f"{ensemble}/member-{i}"}))[0] for i in (1, 2, 3)]
    assert completions(alone[0]) != completions(alone[1]) != completions(alone[2])

    base, center, best, majority = evaluate(
        arguments(
            **options,
            compare_to=model_folder,
            ensemble=True,
            majority_key="my_eval_rewards.first_letter",
            batch_size=5,
        )
    )
    # The run had one update, before which the weights are those of the base model
    assert completions(base) == completions(center)
    assert [best.model, completions(best)] == [f"{ensemble}/member-1", completions(alone[0])]
    assert majority.model == "majority of 3 members"
    elected = []
    for row, of_members in zip(majority.rows, zip(*(one.rows for one in alone), strict=True), strict=True):
        for number, text in enumerate(row["completions"]):
            given = [of_member["completions"][number] for of_member in of_members]
            votes = Counter(one[:1] for one in given)
            assert text == max(given, key=lambda one: votes[one[:1]])  # the first of those with the most votes
            assert row["reward"][number] == sum(map(str.islower, text))
            elected.append(given.index(text))
    assert len(set(elected)) > 1


def test_report_and_table_of_an_ensemble(ensemble, tmp_path, capsys):
    argv = ["--model_name_or_path", ensemble, "--ensemble", "--majority_key", "my_eval_rewards.first_letter"]
    argv += ["--dataset_name", "words.jsonl", "--reward_funcs", "my_eval_rewards.letters", "--use_cpu"]
    argv += ["--max_completion_length", "8", "--temperature", "1", "--num_samples", "2"]
    assert main(["eval", *argv, "--output", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    names = [ensemble, f"{ensemble}/member-1", "majority of 3 members"]
    assert [model["model"] for model in report["models"]] == names
    first, best, last = (model["metrics"]["reward"]["mean"] for model in report["models"])
    assert best != last
    assert report["difference"]["reward"]["mean"] == pytest.approx(last - first)
    assert "The difference is the last model's minus the first's." in " ".join(capsys.readouterr().out.split())


def test_ensembles_that_cannot_be(arguments, model_folder):
    with pytest.raises(ValueError, match="has no members. Give one that `es-trainer replay --top_members` wrote"):
        evaluate(arguments(ensemble=True))
    with pytest.raises(ValueError, match="`ensemble` is given together with `agent`"):
        arguments(ensemble=True, agent="my_eval_rewards.solve")
    with pytest.raises(ValueError, match="`majority_key` has no effect without `ensemble`"):
        arguments(majority_key="my_eval_rewards.first_letter")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("first_letter", "`majority_key='first_letter'` is no dotted path of a function, such as my_lib.first_letter"),
        ("my_eval_rewards.first", "`majority_key` has 'my_eval_rewards.first', but .* has no 'first'"),
    ],
)
def test_a_key_that_is_no_function(key, message, arguments, tmp_path):
    (tmp_path / "member-1").mkdir()
    with pytest.raises(ValueError, match=message):
        evaluate(arguments(model_name_or_path=str(tmp_path), ensemble=True, majority_key=key))
