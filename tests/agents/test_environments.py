"""Environments: one instance for each rollout, whose methods are tools."""

import asyncio
import itertools

import pytest
from calling import PROMPTS, QUESTIONS, Sums, add, calling_model, calling_tokenizer, needs_tools, trained_weights
from conftest import history
from datasets import Dataset

from es_trainer.agents import Environments


pytestmark = needs_tools

EMPTY = [{"role": "user", "content": ""}]


class Asking(Sums):
    """Has the questions itself."""

    questions = itertools.cycle(QUESTIONS)

    def reset(self, **row):
        super().reset()
        return next(self.questions)


class Slow(Sums):
    """Takes its time to score."""

    async def get_reward(self) -> float:
        await asyncio.sleep(0.3)
        (result,) = self.results
        return float(result)


@pytest.fixture
def acting(trainer):
    """Make a trainer of the model that calls tools, in an environment."""

    def make(environment_factory, **options):
        _, length = trained_weights()
        given = {"model": calling_model(), "processing_class": calling_tokenizer(), "eval_dataset": None}
        given |= {"train_dataset": Dataset.from_dict({"prompt": PROMPTS}), "reward_funcs": None, "sigma": 1e-4}
        given |= {"max_completion_length": length + 8, "environment_factory": environment_factory, "max_steps": 1}
        return trainer(**given | options)

    return make


def logged(run) -> dict:
    return [log for log in run.state.log_history if "reward" in log][-1]


@pytest.mark.parametrize("options", [{"population_batch_size": 1}, {"perturbation": "low_rank"}])
def test_members_act_in_environments_of_their_own_rows(acting, options):
    options |= {"unique_prompts": True, "num_prompts_per_step": 1, "population_size": 2, "shuffle_dataset": False}
    run = acting(Sums, **options)
    run.train()
    (line,) = history(run.args.output_dir)
    assert line["rewards"] == [2 + 3, 1 + 1]


@pytest.mark.parametrize("options", [{"population_batch_size": 1}, {"perturbation": "low_rank"}])
@pytest.mark.parametrize("kind", [Sums, Slow])
def test_an_environment_gives_the_reward(acting, options, kind):
    kind.made = 0
    run = acting(kind, max_steps=3, **options)
    run.train()
    assert logged(run)["rewards/" + kind.__name__ + "/mean"] == logged(run)["reward"] == 3.5
    rollouts_together = 2 * (1 if options == {"population_batch_size": 1} else 4)
    # Not used again while rewards may be computed, and not made anew in each step
    assert kind.made <= 2 * rollouts_together


def test_reward_functions_get_the_environments(acting):
    seen = []

    def reward(environments, prompts, completions, **kwargs):
        seen.extend((each.results, prompt[-1]["content"]) for each, prompt in zip(environments, prompts, strict=True))
        return [1.0] * len(environments)

    run = acting(Asking, reward_funcs=reward, train_dataset=Dataset.from_dict({"prompt": [EMPTY] * 2}))
    run.train()
    assert logged(run)["reward"] == 1.0 + 3.5
    assert sorted(seen) == sorted([([5], "two and three?"), ([2], "one and one?")] * 4)


def test_environments_make_their_own_data(acting):
    run = acting(Asking, train_dataset=None, num_prompts_per_step=2)
    run.train()
    assert run.state.global_step == 1 and logged(run)["reward"] == 3.5


def test_rows_choose_their_environment(acting):
    class Products(Sums):
        def multiply(self, a: int, b: int) -> int:
            """
            Multiply two numbers.

            Args:
                a: The first.
                b: The second.
            """
            return a * b

        def get_reward(self) -> float:
            return 10.0

    rows = [{"prompt": prompt, "environment": name} for prompt, name in zip(PROMPTS, ("sums", "both"), strict=True)]
    run = acting({"sums": Sums, "both": Products}, train_dataset=Dataset.from_list(rows))
    ids = run.backend.answers.tokenize(run.engine, rows)
    texts = [run.processing_class.decode(tokens) for tokens in ids]
    assert ["multiply" in text for text in texts] == [False, True] and all('"add"' in text for text in texts)
    run.train()
    # Each kind scores its own rollouts alone
    assert logged(run)["rewards/Sums/mean"] == 5.0 and logged(run)["rewards/Products/mean"] == 10.0
    with pytest.raises(ValueError, match="A row has `environment='other'`, but .* has 'sums', 'both'"):
        acting(
            {"sums": Sums, "both": Products}, train_dataset=Dataset.from_list([{**rows[0], "environment": "other"}])
        )


class WithoutReset:
    def add(self, a: int) -> int:
        """
        Add.

        Args:
            a: A number.
        """


class Unclear(Sums):
    def act(self, x):
        pass


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (WithoutReset, ValueError, "The environment `WithoutReset` has no method `reset"),
        (Unclear, ValueError, "The tool `act` cannot be shown to the model"),
        ("Sums", TypeError, "`environment_factory` has 'Sums', but must make an environment"),
        ({"a": 3}, TypeError, "`environment_factory` has 3"),
    ],
)
def test_environments_that_cannot_work(acting, factory, error, message):
    with pytest.raises(error, match=message):
        acting(factory)


def test_an_observation_is_a_text(acting):
    class Numbers(Sums):
        def reset(self, **row):
            return 3

    with pytest.raises(TypeError, match="`Numbers.reset` returned int, but must return a text or None"):
        acting(Numbers).train()


def test_there_has_to_be_a_reward(acting):
    class Silent:
        def reset(self, **row):
            pass

    with pytest.raises(ValueError, match="there is no reward to train on"):
        acting(Silent)


def test_tools_that_all_environments_have():
    found = Environments({"a": Sums, "b": Asking}, []).toolboxes
    assert [list(toolbox.by_name) for toolbox in found.values()] == [["add"], ["add"]]
    with pytest.raises(ValueError, match="two functions with the name 'add'"):
        Environments(Sums, [add])
