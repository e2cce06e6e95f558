"""`train_dataset`, `eval_dataset` and prompts, as GRPOTrainer documents them."""

import pytest
from conftest import letters, logs, make_tokenizer
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


class Recorder:
    """A reward that keeps what it was given."""

    __name__ = "recorder"

    def __init__(self):
        self.prompts: list[list] = []
        self.columns: set[str] = set()

    def __call__(self, prompts, completions, **kwargs):
        self.prompts.append(prompts)
        self.columns |= kwargs.keys()
        return letters(completions)


@pytest.mark.parametrize("kind", [lambda dataset: dataset, stream])
def test_unused_columns_are_removed(trainer, dataset, kind):
    recorder = Recorder()
    run = trainer(
        train_dataset=kind(dataset),
        eval_dataset=kind(dataset),
        reward_funcs=recorder,
        remove_unused_columns=True,
        max_steps=1,
    )
    run.train()
    run.evaluate()
    assert "answer" not in recorder.columns
    assert recorder.prompts and set(sum(recorder.prompts, [])) <= set(dataset["prompt"])


def solve(batch):
    return {"prompt": [f"Solve {question}" for question in batch["question"]], "question": batch["question"]}


@pytest.mark.parametrize("stored", [["prompt", "question"], ["question"]])
@pytest.mark.parametrize("remove_unused_columns", [False, True])
def test_transforms(trainer, stored, remove_unused_columns):
    rows = Dataset.from_dict({name: [f"Q{i}" for i in range(4)] for name in stored}).with_transform(solve)
    recorder = Recorder()
    run = trainer(
        train_dataset=rows,
        eval_dataset=rows,
        reward_funcs=recorder,
        remove_unused_columns=remove_unused_columns,
        max_steps=2,
    )
    run.train()
    assert set(sum(recorder.prompts, [])) == {f"Solve Q{i}" for i in range(4)}
    assert ("question" in recorder.columns) != remove_unused_columns


def test_a_transform_that_makes_no_prompts(trainer, dataset):
    rows = dataset.with_transform(lambda batch: {"answer": batch["answer"]})
    with pytest.raises(ValueError, match=r"`train_dataset` has no column 'prompt'; its columns are \['answer'\]"):
        trainer(model="no/such-model", train_dataset=rows)


def test_a_format_that_leaves_the_prompts_out(trainer, dataset):
    with pytest.raises(ValueError, match="`train_dataset` has no column 'prompt'"):
        trainer(model="no/such-model", train_dataset=dataset.with_format("torch", columns=["answer"]))


def test_a_format_of_some_columns_with_all_of_them(trainer, dataset):
    recorder = Recorder()
    rows = dataset.with_format("torch", columns=["answer"], output_all_columns=True)
    trainer(train_dataset=rows, reward_funcs=recorder, max_steps=1).train()
    assert set(sum(recorder.prompts, [])) <= set(dataset["prompt"])


@pytest.mark.parametrize("kind", [lambda dataset: dataset, stream])
@pytest.mark.parametrize("format", ["torch", "numpy"])
@pytest.mark.parametrize("prompts", [["one", "two"], [conversation("one"), conversation("two")]])
def test_formats(trainer, kind, format, prompts):
    recorder = Recorder()
    rows = kind(Dataset.from_dict({"prompt": prompts})).with_format(format)
    run = trainer(train_dataset=rows, eval_dataset=rows, reward_funcs=recorder, shuffle_dataset=False, max_steps=1)
    run.train()
    run.evaluate()
    assert all(seen == prompts and type(seen[0]) is type(prompts[0]) for seen in recorder.prompts)


@pytest.mark.parametrize("format", ["arrow", "pandas"])
def test_formats_of_tables(trainer, dataset, format):
    with pytest.raises(ValueError, match=f"`train_dataset` has the format '{format}'.*Give dataset.with_format"):
        trainer(model="no/such-model", train_dataset=dataset.with_format(format))


def test_a_stream_of_tables(trainer, dataset):
    with pytest.raises(TypeError, match="`train_dataset` has rows of type Table, but they must be dictionaries"):
        trainer(train_dataset=stream(dataset).with_format("arrow")).train()


def order(trainer, rows: Dataset, **options) -> list[str]:
    recorder = Recorder()
    run = trainer(train_dataset=rows, reward_funcs=recorder, **options)
    run.train()
    steps = recorder.prompts[:: run.args.population_size]
    assert len(steps) == run.args.max_steps
    return sum(steps, [])


def test_streams_are_shuffled(trainer):
    rows = stream(Dataset.from_list([{"prompt": f"q{i}"} for i in range(20)]))
    in_order = [f"q{i}" for i in range(20)]
    assert order(trainer, rows, shuffle_dataset=False, max_steps=10) == in_order
    shuffled = order(trainer, rows, max_steps=10)
    assert shuffled != in_order and sorted(shuffled) == sorted(in_order)
    assert order(trainer, rows, max_steps=3) == shuffled[:6]
    assert order(trainer, rows, max_steps=3, seed=7) != shuffled[:6]
    assert order(trainer, rows, max_steps=3, seed=7, data_seed=42) == shuffled[:6]  # 42 is the default `seed`


@pytest.mark.parametrize("saved", [2, 4])
def test_a_stream_that_goes_on_is_shuffled_as_before(trainer, saved):
    rows = stream(Dataset.from_list([{"prompt": f"q{i}"} for i in range(6)]))  # begins again after three steps
    whole = order(trainer, rows, max_steps=5)
    order(trainer, rows, max_steps=saved, save_strategy="steps", save_steps=saved)
    recorder = Recorder()
    run = trainer(train_dataset=rows, reward_funcs=recorder, max_steps=5)
    run.train(resume_from_checkpoint=f"{run.args.output_dir}/checkpoint-{saved}")
    assert sum(recorder.prompts[::4], []) == whole[2 * saved :]


@pytest.mark.parametrize("column", ["video", "videos", "audio"])
def test_what_no_model_can_see(trainer, dataset, column):
    rows = dataset.add_column(column, ["a file"] * len(dataset))
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=rf"`{name}` has the column '{column}'.*remove_columns\(\['{column}'\]\)"):
            trainer(model="no/such-model", **{name: rows})


def test_messages_with_parts(trainer):
    def rows(*types: str) -> Dataset:
        parts = [{"type": kind, "text": "What is this?"} for kind in types]
        return Dataset.from_list([{"prompt": [{"role": "user", "content": parts}]}] * 2)

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
    trainer(train_dataset=rows("text"), processing_class=tokenizer)
    for given in (rows("text", "image"), stream(rows("text", "image"))):
        with pytest.raises(ValueError, match="Prompt 0 has a part of type 'image', but `processing_class` is a tok"):
            trainer(train_dataset=given, processing_class=tokenizer, max_steps=1).train()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["one", None], "Prompt 1 is 'None', of type NoneType"),
        ([1, 2], "Prompt 0 is '1', of type int"),
        ([["one"], ["two"]], "Prompt 0 is .*, of type list"),
        ([conversation("one"), []], "Prompt 1 is empty"),
        (["one", ""], "Prompt 1 is empty"),
    ],
)
def test_what_is_no_prompt(trainer, prompts, message):
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(train_dataset=Dataset.from_dict({"prompt": prompts}))


@pytest.mark.parametrize("length", [{}, {"max_steps": -1, "num_train_epochs": 2}])
def test_fewer_rows_than_a_batch_that_must_be_full(trainer, dataset, length):
    with pytest.raises(
        ValueError, match="`train_dataset` has 6 rows, fewer than the 10 of a batch .`num_prompts_per_step`.*drop"
    ):
        trainer(
            model="no/such-model",
            num_prompts_per_step=10,
            per_device_train_batch_size=10,
            dataloader_drop_last=True,
            **length,
        )
    with pytest.raises(
        ValueError, match="`eval_dataset` has 6 rows, fewer than the 7 of a batch .`per_device_eval_batch_size`"
    ):
        trainer(model="no/such-model", per_device_eval_batch_size=7, dataloader_drop_last=True, **length)


def nothing():
    yield from ()


def test_empty_streams(trainer):
    empty = IterableDataset.from_generator(nothing)
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        trainer(train_dataset=empty).train()
    with pytest.raises(ValueError, match="`eval_dataset` is empty"):
        trainer(eval_dataset=empty).evaluate()


def test_no_training_set(trainer):
    with pytest.raises(ValueError, match="train_dataset"):
        trainer(train_dataset=None).train()


def test_evaluations_of_other_datasets_are_checked(trainer, dataset):
    run = trainer()
    without = dataset.rename_column("prompt", "question")
    for call in (run.evaluate, run.predict):
        with pytest.raises(ValueError, match="`eval_dataset` has no column 'prompt'"):
            call(without)
        with pytest.raises(ValueError, match="`eval_dataset` has no column 'prompt'"):
            call(IterableDataset.from_generator(lambda: iter([{"question": "a"}])))
    with pytest.raises(TypeError, match="`eval_dataset` must be a `Dataset`"):
        run.evaluate([{"prompt": "a"}])


def test_how_many_prompts_are_too_long_and_what_drops_them(trainer):
    rows = Dataset.from_dict({"prompt": ["a" * 10, "a" * 249, "a" * 248, "a" * 300]})
    with pytest.raises(ValueError, match="Prompt 1 has 249 tokens") as refused:
        trainer(train_dataset=rows)
    message = str(refused.value)
    assert "context of 256 tokens. Too long are 2 of 4 prompts, the longest with 300 tokens." in message
    namespace = {"train_dataset": rows, "tokenizer": make_tokenizer()}
    exec(message.split("drop them: `")[1].removesuffix("`."), namespace)
    assert namespace["train_dataset"]["prompt"] == ["a" * 10, "a" * 248]
    trainer(train_dataset=namespace["train_dataset"])


def test_what_drops_conversations_that_are_too_long(trainer):
    rows = Dataset.from_dict({"prompt": [conversation("a"), conversation("a" * 210), conversation("a" * 300)]})
    options = {"chat_template_kwargs": {"shout": True}}
    with pytest.raises(ValueError, match="Too long are 2 of 3 prompts") as refused:
        trainer(eval_dataset=rows, **options)
    namespace = {"eval_dataset": rows, "tokenizer": make_tokenizer()}
    exec(str(refused.value).split("drop them: `")[1].removesuffix("`."), namespace)
    assert namespace["eval_dataset"]["prompt"] == [conversation("a")]
