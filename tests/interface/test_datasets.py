"""`train_dataset`, `eval_dataset` and prompts, as GRPOTrainer documents them."""

import pytest
from conftest import logs, make_tokenizer
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict


def conversation(word: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": word}]


def stream(dataset: Dataset) -> IterableDataset:
    return dataset.to_iterable_dataset()


@pytest.mark.parametrize("kind", [dict, DatasetDict, IterableDatasetDict])
def test_metrics_of_each_set_in_a_dict(trainer, dataset, kind):
    sets = {"first": dataset.select([0]), "rest": dataset.select([1, 2])}
    if kind is IterableDatasetDict:
        sets = {name: stream(part) for name, part in sets.items()}
    run = trainer(eval_dataset=kind(sets), eval_strategy="steps", eval_steps=1, max_steps=2)
    run.train()
    logged = {key for log in run.state.log_history for key in log}
    assert {"eval_first_reward", "eval_rest_reward", "eval_rest_rewards/letters/mean", "eval_rest_loss"} <= logged
    metrics = run.evaluate()
    assert metrics["eval_first_reward"] == pytest.approx(run.evaluate(dataset.select([0]))["eval_reward"])


def test_streams(trainer, dataset):
    seen = []

    def reward(prompts, completions, answer, **kwargs):
        assert [f"Say {word}" for word in answer] == prompts
        seen.append(tuple(prompts))
        return [float(len(c)) for c in completions]

    run = trainer(train_dataset=stream(dataset), eval_dataset=stream(dataset), reward_funcs=reward, max_steps=4)
    run.train()
    assert sorted(sum(seen[::4][:3], ())) == sorted(dataset["prompt"])  # each prompt once, then from the start
    assert "eval_reward" in run.evaluate()


def test_a_stream_needs_max_steps(trainer, dataset):
    with pytest.raises(ValueError, match="`max_steps=-1`.*Set `max_steps`"):
        trainer(model="no/such-model", train_dataset=stream(dataset), max_steps=-1)


def test_a_stream_that_is_known_to_have_no_prompts(trainer, dataset):
    with pytest.raises(ValueError, match="`train_dataset` has no column 'prompt'"):
        trainer(model="no/such-model", train_dataset=stream(dataset.rename_column("prompt", "question")))


def test_all_splits_for_training(trainer, dataset):
    with pytest.raises(TypeError, match=r"`train_dataset` is a DatasetDict with the splits \['train', 'test'\]"):
        trainer(model="no/such-model", train_dataset=DatasetDict(train=dataset, test=dataset))


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_what_is_no_dataset(trainer, name):
    with pytest.raises(TypeError, match=f"`{name}` must be a `Dataset` or `IterableDataset`, but is a list"):
        trainer(model="no/such-model", **{name: [{"prompt": "a"}]})


def test_conversations_with_system_prompts_and_template_options(trainer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}={{ m['content'] }};{% endfor %}{% if shout %}!{% endif %}"
    )
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append((prompts[0], completions[0]))
        return [float(len(c[0]["content"])) for c in completions]

    rows = Dataset.from_list([{"prompt": conversation(word)} for word in ("one", "two")])
    run = trainer(
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=rows,
        eval_dataset=None,
        chat_template_kwargs={"shout": True},
        max_steps=1,
    )
    (ids,) = run.engine.tokenize([conversation("one")])
    assert tokenizer.decode(ids) == "system=Be brief.;user=one;!"
    run.train()
    prompt, completion = seen[0]
    assert prompt[0] == {"role": "system", "content": "Be brief."} and completion[0]["role"] == "assistant"


def test_conversations_without_a_chat_template(trainer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    rows = Dataset.from_list([{"prompt": conversation("one")}])
    with pytest.raises(ValueError, match="the tokenizer has no chat template. Set `tokenizer.chat_template`"):
        trainer(processing_class=tokenizer, train_dataset=rows)


def test_plain_prompts_need_no_chat_template(trainer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    run = trainer(processing_class=tokenizer, max_steps=1)
    run.train()
    assert len(logs(run)) == 1


def test_more_completions_in_evaluations(trainer, dataset):
    counts = []

    def reward(completions, **kwargs):
        counts.append(len(completions))
        return [float(len(c)) for c in completions]

    run = trainer(reward_funcs=reward, num_generations_eval=3, temperature=1.0, max_steps=1)
    run.train()
    assert set(counts) == {2}
    counts.clear()
    run.evaluate()
    assert sum(counts) == 3 * len(dataset)
