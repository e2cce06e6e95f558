"""Rollouts in which a model calls tools, on each backend of one process."""

import json
import re

import pytest
import torch
from calling import (
    PROMPTS,
    QUESTIONS,
    add,
    calling_model,
    calling_tokenizer,
    conversation,
    needs_tools,
    trained_weights,
)
from conftest import letters, make_tokenizer
from datasets import Dataset
from transformers.utils import get_json_schema

from es_trainer.backends import Prompts


pytestmark = needs_tools

DATA = Dataset.from_dict({"prompt": PROMPTS})


@pytest.fixture
def calling(trainer):
    """Make a trainer of the model that calls tools."""

    def make(**options):
        _, length = trained_weights()
        given = {"model": calling_model(), "tools": [add], "processing_class": calling_tokenizer()}
        given |= {"train_dataset": DATA, "eval_dataset": DATA, "sigma": 1e-4, "max_completion_length": length + 8}
        return trainer(**given | options)

    return make


class Seen:
    """A reward function that keeps what it got."""

    __name__ = "seen"

    def __init__(self):
        self.completions, self.ids = [], []

    def __call__(self, completions, completion_ids, **kwargs):
        self.completions += completions
        self.ids += completion_ids
        return [float(completion[-1]["content"] == "It is 5.") for completion in completions]


MODES = {
    "one at a time": {"population_batch_size": 1},
    "population batch": {"perturbation": "low_rank", "population_batch_size": 3},
    "stacked weights": {"population_batch_size": 4},
}


@pytest.mark.parametrize("mode", MODES)
def test_members_call_tools_and_answer_with_their_results(calling, mode):
    seen = Seen()
    run = calling(reward_funcs=seen, max_steps=1, **MODES[mode])
    run.train()
    expected = [conversation(question)[1:] for question in QUESTIONS]
    found = [[{k: v for k, v in message.items() if v} for message in completion] for completion in seen.completions]
    wanted = [[{k: v for k, v in message.items() if v} for message in messages] for messages in expected]
    assert len(found) == 4 * 2
    assert all(messages in wanted for messages in found) and wanted[0] in found and wanted[1] in found
    (log,) = [log for log in run.state.log_history if "reward" in log]
    assert log["tools/call_frequency"] == 1.0 and log["tools/failure_frequency"] == 0.0
    assert log["tools/turns"] == 2.0
    assert log["reward"] == 0.5


@pytest.mark.parametrize("mode", MODES)
def test_members_have_questions_of_their_own(calling, mode):
    seen = Seen()
    options = {"unique_prompts": True, "antithetic": True, "num_prompts_per_step": 1, "shuffle_dataset": False}
    calling(reward_funcs=seen, max_steps=1, **options, **MODES[mode]).train()
    expected = [conversation(question)[-1]["content"] for question in QUESTIONS for _ in range(2)]
    assert [completion[-1]["content"] for completion in seen.completions] == expected


def test_a_turn_goes_on_from_the_tokens_before(calling):
    """A conversation has the tokens that the chat template writes for it. Lengths leave the tools' part out."""
    run = calling()
    tokenizer = run.processing_class
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    answers = run.backend.answers
    with run.backend.in_working_dtype():
        ids = answers.tokenize(run.engine, rows)
        completions, _, _ = answers.complete(
            run.engine, [Prompts(rows, ids, 1, seed=0)], range(2), ["policy"], None, None
        )
    for question, prompt, completion in zip(QUESTIONS, ids, completions, strict=True):
        text = tokenizer.apply_chat_template(
            conversation(question), tools=[get_json_schema(add)], tokenize=False
        ).removesuffix("\n")
        assert tokenizer.decode(prompt + completion.ids) == text
        result = f"<|im_start|>user\n<tool_response>\n{sum(QUESTIONS[question])}\n</tool_response><|im_end|>\n"
        assert completion.others == len(tokenizer("\n" + result + "<|im_start|>assistant\n")["input_ids"])
        assert not completion.truncated and completion.tool_calls == [False]


def test_a_tool_that_raises(calling):
    def broken(a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        raise ArithmeticError("out of order")

    broken.__name__ = "add"
    seen = Seen()
    run = calling(reward_funcs=seen, tools=[broken], max_steps=1, max_completion_length=400)
    run.train()
    (log,) = [log for log in run.state.log_history if "reward" in log]
    assert log["tools/failure_frequency"] == 1.0
    assert json.loads(seen.completions[0][1]["content"]) == {"error": "out of order"}


def test_a_result_without_room_is_dropped(calling):
    seen = Seen()

    def call_again(a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        return "x" * 10_000

    call_again.__name__ = "add"
    calling(reward_funcs=seen, tools=[call_again], max_steps=1).train()
    # The rollout ends with the call
    assert [len(completion) for completion in seen.completions] == [1] * 8
    assert all(completion[0]["tool_calls"] for completion in seen.completions)


def test_a_completion_is_no_longer_than_the_maximum(calling):
    seen = Seen()
    _, length = trained_weights()
    run = calling(reward_funcs=seen, max_steps=1, max_completion_length=length - 4)
    run.train()
    assert max(map(len, seen.ids)) == length - 4
    assert [log["completions/clipped_ratio"] for log in run.state.log_history if "reward" in log] == [1.0]


@pytest.mark.parametrize("most", [1, None])
def test_most_turns(calling, most):
    seen = Seen()
    run = calling(reward_funcs=seen, max_steps=1, max_tool_calling_iterations=most)
    run.train()
    assert [len(completion) for completion in seen.completions] == [3] * 8


def test_weights_do_not_depend_on_how_members_are_evaluated(calling):
    def shared(completions, completion_ids, **kwargs):
        return [float(sum(ids) % 7) for ids in completion_ids]

    runs = [
        calling(reward_funcs=shared, max_steps=2, sigma=0.02, **MODES[m]) for m in MODES if m != "population batch"
    ]
    for run in runs:
        run.train()
    mine, theirs = ({n: p.detach() for n, p in run.model.named_parameters()} for run in runs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"processing_class": make_tokenizer()},
            ValueError,
            "`tools` need a chat template that can write a conversat",
        ),
        (
            {"train_dataset": Dataset.from_dict({"prompt": ["x"]})},
            ValueError,
            "need conversational prompts, but those of `train_dataset` are texts",
        ),
        (
            {"rollout_func": lambda prompts, trainer: {}},
            ValueError,
            "`rollout_func` with `tools` or `environment_factory`",
        ),
        ({"tools": [lambda x: x]}, ValueError, "The tool `<lambda>` cannot be shown to the model"),
        ({"max_tool_calling_iterations": 0}, ValueError, "`max_tool_calling_iterations=0` is not valid"),
    ],
)
def test_what_cannot_work(calling, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        calling(reward_funcs=letters, **options)
