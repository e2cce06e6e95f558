"""Prompts on which all members agree are drawn less often."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same, logs, weights
from torch.utils.data import BatchSampler

from es_trainer.run.settled_prompts import SettledPrompts


EASY = {"one", "three", "five"}  # which all members answer alike


def from_the_answer(completions, answer, **kwargs) -> list[float]:
    # Of other texts, checksums are others
    rewards = [zlib.crc32(completion.encode()) / 2**32 for completion in completions]
    return [1.0 if word in EASY else reward for word, reward in zip(answer, rewards, strict=True)]


def draw(sampler: SettledPrompts, epochs: int, settled_rows: set[int]) -> list[list[int]]:
    """Batches of an epoch after the other, drawn one step ahead as in training."""
    batches = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        of_epoch = iter(BatchSampler(sampler, sampler.batch_size, drop_last=False))
        batch = next(of_epoch)
        while batch is not None:
            following = next(of_epoch, None)
            assert sampler.tell(np.array([row in settled_rows for row in batch]))["rows"] == batch
            batches.append(batch)
            batch = following
    return batches


def test_settled_rows_are_passed_over_as_often_as_asked():
    settled = set(range(50))
    batches = draw(SettledPrompts(100, 10, skip=0.75, seed=0), 200, settled)
    rows = [row for batch in batches[20:] for row in batch]  # all were drawn once, and told of
    share = np.mean([row in settled for row in rows])
    # Of settled candidates a quarter stays, of others all: 1/4 : 1. The first pass of an epoch draws no row twice
    assert share == pytest.approx(0.2, abs=0.01)
    assert all(len(set(batch)) == 10 for batch in batches)
    assert len(batches) == 200 * 10


def test_rows_that_are_not_settled_are_in_every_epoch():
    batches = draw(SettledPrompts(20, 4, skip=0.9, seed=1), 30, set(range(8)))
    for epoch in range(30):
        rows = {row for batch in batches[5 * epoch : 5 * epoch + 5] for row in batch}
        assert rows >= set(range(8, 20))


def test_a_row_that_is_settled_no_more_is_drawn_as_before():
    sampler = SettledPrompts(10, 5, skip=0.99, seed=0)
    draw(sampler, 3, set(range(10)))  # all are settled, and training goes on
    assert sampler.share == 1.0
    sampler = SettledPrompts(10, 5, skip=0.99, seed=0)
    sampler.resume(
        [{"rows": [3], "settled": [True]}, {"rows": [3], "settled": [False]}, *[{"rows": [], "settled": []}] * 8]
    )
    sampler.set_epoch(5)
    assert sorted(sampler) == list(range(10))


def test_without_settled_rows_an_epoch_is_the_dataset():
    for shuffle in (True, False):
        batches = draw(SettledPrompts(10, 4, skip=0.9, seed=3, shuffle=shuffle), 2, set())
        first = [row for batch in batches[:3] for row in batch]
        assert sorted(first) == list(range(10)) and [len(batch) for batch in batches[:3]] == [4, 4, 2]
        assert (first == list(range(10))) == (not shuffle)


RUN = {"reward_funcs": from_the_answer, "skip_settled_prompts": 0.9, "max_steps": 12, "save_steps": 5}


def settings(tmp_path: Path, name: str) -> dict:
    return {**RUN, "save_strategy": "steps", "output_dir": str(tmp_path / name)}


def lines(run) -> list[dict]:
    _, *found = map(json.loads, (Path(run.args.output_dir) / "history.jsonl").read_text().splitlines())
    return found


def test_training_skips_what_all_members_answer_alike(trainer, dataset, tmp_path):
    run = trainer(**settings(tmp_path, "run"))
    run.train()
    easy = [row for row, word in enumerate(dataset["answer"]) if word in EASY]
    drawn = [line["prompts"] for line in lines(run)]
    assert all(
        settled == (row in easy) for line in drawn for row, settled in zip(line["rows"], line["settled"], strict=True)
    )
    later = [row for line in drawn[4:] for row in line["rows"]]
    assert np.mean([row in easy for row in later]) < 0.25  # of 0.5 without it
    shares = [log["frac_settled_prompts"] for log in logs(run)]
    assert shares[0] == shares[1] == 0.0 and shares[-1] == 0.5  # what is drawn for a step knows the last but one


@pytest.mark.parametrize("checkpoint", [5, 10])
def test_a_resumed_run_draws_the_same_prompts(trainer, tmp_path, checkpoint):
    whole = trainer(**settings(tmp_path, "whole"))
    whole.train()
    resumed = trainer(**settings(tmp_path, "resumed"))
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{checkpoint}")
    assert [line["prompts"] for line in lines(resumed)] == [line["prompts"] for line in lines(whole)]
    assert_same(weights(resumed.model), weights(whole.model))


def test_updates_that_are_done_again_draw_the_same_prompts(trainer, tmp_path):
    whole = trainer(**settings(tmp_path, "whole"))
    whole.train()
    path = Path(whole.args.output_dir) / "history.jsonl"
    complete = path.read_text()
    path.write_text("".join(line + "\n" for line in complete.splitlines()[:9]))  # killed after step 8
    again = trainer(**settings(tmp_path, "whole"))
    for checkpoint in Path(whole.args.output_dir).glob("checkpoint-1*"):
        checkpoint.rename(tmp_path / checkpoint.name)
    again.train(resume_from_checkpoint=True)
    assert [line["prompts"] for line in lines(again)] == [
        json.loads(line)["prompts"] for line in complete.splitlines()[1:]
    ]
    assert_same(weights(again.model), weights(whole.model))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"skip_settled_prompts": 1.0}, "less than 1"),
        ({"skip_settled_prompts": -0.1}, "less than 1"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers=0"),
        ({"ignore_data_skip": True}, "ignore_data_skip=False"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='random'"),
    ],
)
def test_settings_that_cannot_work_are_refused(trainer, options, said):
    with pytest.raises(ValueError, match=f"skip_settled_prompts=.*{said}"):
        trainer(**RUN | options)


def test_streams_and_rewards_of_sets_are_refused(trainer, dataset):
    def of_set(completions, **kwargs):
        return 1.0

    of_set.reward_scope = "member"
    with pytest.raises(ValueError, match="cannot be drawn again"):
        trainer(**RUN, train_dataset=dataset.to_iterable_dataset())
    with pytest.raises(ValueError, match="about the whole set"):
        trainer(**RUN | {"reward_funcs": of_set})
