"""Rewards that are about all completions of a member."""

import functools
import statistics
from collections import Counter

import pytest
from conftest import letters, logs, make_tokenizer

from es_trainer.rewards import per_member
from es_trainer.rewards.scorer import Scorer
from es_trainer.rollout import Generations


class Distinct:
    """The share of different completions, and how many it was called with."""

    reward_scope = "member"
    __name__ = "distinct"

    def __init__(self):
        self.sizes = []

    def __call__(self, completions, answer, **kwargs) -> float:
        assert len(answer) == len(completions)
        self.sizes.append(len(completions))
        return len(set(completions)) / len(completions)


def test_it_gets_all_completions_of_a_member_and_of_an_evaluation(trainer):
    distinct = Distinct()
    run = trainer(
        reward_funcs=distinct,
        max_steps=1,
        temperature=1.0,
        num_generations=3,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
    )
    run.train()
    assert distinct.sizes == [2 * 3] * 4
    metrics = run.evaluate()
    assert distinct.sizes[4:] == [6 * 2]  # of both batches
    assert metrics["eval_reward"] == metrics["eval_rewards/distinct/mean"]
    assert metrics["eval_rewards/distinct/std"] == 0.0


def test_an_evaluation_is_the_same_in_batches_of_any_size(trainer):
    def metrics(size: int) -> dict:
        run = trainer(reward_funcs=[letters, Distinct()], reward_weights=[1.0, 10.0], per_device_eval_batch_size=size)
        return {key: value for key, value in run.evaluate().items() if "second" not in key and "runtime" not in key}

    assert metrics(1) == pytest.approx(metrics(6))


def test_it_counts_beside_other_rewards(trainer):
    def number(texts: list[str]) -> float:
        return float(len(set("".join(texts))))

    run = trainer(
        reward_funcs=[letters, per_member(lambda completions, **kwargs: number(completions))],
        reward_weights=[1.0, 0.5],
        max_steps=1,
    )
    seen: list[tuple[float, float]] = []
    asked = run.scorer.functions[0]

    def spy(completions, **kwargs):
        values = asked(completions, **kwargs)
        seen.append((sum(values) / len(values), number(completions)))
        return values

    run.scorer.functions[0] = spy
    run.train()
    (log,) = logs(run)
    rewards = [mean + 0.5 * of_set for mean, of_set in seen]
    assert log["reward"] == pytest.approx(sum(rewards) / 4)
    assert (log["reward_max"], log["reward_min"]) == pytest.approx((max(rewards), min(rewards)))
    assert log["rewards/letters/mean"] == pytest.approx(sum(mean for mean, _ in seen) / 4)


def score(function, count: int = 3):
    rows = [{"prompt": "Say", "answer": "word"}] * count
    return Scorer(function)(rows, ["text"] * count, [[1]] * count, None)


def test_it_may_say_nothing_and_may_be_async_or_partial():
    @per_member
    async def later(completions, weight=1.0, **kwargs):
        return weight * len(completions)

    assert score(functools.partial(later, weight=2.0)).total.tolist() == [6.0] * 3
    scores = score([per_member(lambda **kwargs: None), letters])
    assert scores.total.tolist() == letters(["text"] * 3)


@pytest.mark.parametrize("returned", [[1.0, 1.0, 1.0], float("nan"), "1", {"f1": 1.0}])
def test_it_returns_one_number(returned):
    @per_member
    def broken(**kwargs):
        return returned

    with pytest.raises(ValueError, match=r"'broken' returned .* for all completions"):
        score(broken)


def test_a_number_in_place_of_a_list_is_an_error_that_names_the_way_out():
    def forgotten(**kwargs):
        return 1.0

    with pytest.raises(ValueError, match=r"'forgotten' returned 1.0 .*es_trainer.rewards.per_member"):
        score(forgotten)


def test_a_scope_that_is_unknown():
    def strange(**kwargs):
        return 1.0

    strange.reward_scope = "population"
    with pytest.raises(ValueError, match="'strange' has `reward_scope='population'`: it is one of 'completion', 'mem"):
        Scorer(strange)


def test_the_signal_is_that_of_the_other_rewards(trainer):
    run = trainer(reward_funcs=[letters, Distinct()], reward_weights=[1.0, 100.0], max_steps=1)
    run.train()
    alone = trainer(reward_funcs=letters, max_steps=1)
    alone.train()
    assert logs(run)[0]["signal"] == pytest.approx(logs(alone)[0]["signal"])
    of_sets = trainer(reward_funcs=Distinct(), max_steps=1)
    of_sets.train()
    assert "signal" not in logs(of_sets)[0]


def test_the_majority_is_of_the_answers_that_a_key_function_finds(trainer):
    def first_letter(completion: str) -> str:
        return completion[:1]

    asked: list[list[str]] = []

    def words(completions, **kwargs):
        asked.append(completions)
        return [float(ord(completion[:1] or "\0")) for completion in completions]

    run = trainer(
        reward_funcs=words,
        majority_key=first_letter,
        generation_reward="majority",
        num_generations=5,
        temperature=1.0,
        max_steps=1,
        processing_class=make_tokenizer(),
    )
    run.train()
    found = run.scorer.generations
    assert found.keys(["ab", "ac", "b"], 3) == [["a", "a", "b"]]

    def of_prompt(completions: list[str]) -> float:
        """Rewards are the letters' numbers: of those that are most frequent, the mean."""
        counts = Counter(map(first_letter, completions))
        return statistics.mean(ord(key or "\0") for key, n in counts.items() if n == max(counts.values()))

    rewards = [statistics.mean(map(of_prompt, (texts[:5], texts[5:]))) for texts in asked]
    assert logs(run)[0]["reward_max"] == pytest.approx(max(rewards))
    assert max(rewards) > min(rewards) > 0
    assert logs(run)[0]["reward_min"] == pytest.approx(min(rewards))


def test_a_majority_key_that_cannot_work():
    with pytest.raises(TypeError, match="`majority_key` is 'answer': give a function"):
        Generations("majority", "answer")
    with pytest.raises(ValueError, match="`majority_key` has no effect with generation_reward='mean'"):
        Generations("mean", str.strip)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"generation_reward": "median"}, "choose 'mean', 'max', 'majority' or 'pass@k', such as 'pass@4'"),
        ({"generation_reward": "pass@0"}, "choose 'mean'"),
        ({"generation_reward": "pass@3", "num_generations": 2, "temperature": 1.0}, "but num_generations=2"),
        ({"generation_reward": "pass@3", "num_generations": 3}, "but num_generations=1"),  # greedy ones are equal
        (
            {"generation_reward": "pass@3", "num_generations": 3, "num_generations_eval": 2, "temperature": 1.0},
            "but num_generations_eval=2",
        ),
    ],
)
def test_generation_rewards_that_cannot_be(config, options, said):
    with pytest.raises(ValueError, match="`generation_reward=") as error:
        config(**options)
    assert said in str(error.value)
