"""`rollout_func`, as GRPOTrainer documents it."""

import sys

import pytest
import torch
from conftest import assert_same, letters, logs, make_model, weights
from datasets import Dataset


def rollout(prompts, trainer):
    """Greedy completions by Transformers' own `generate`."""
    tokenizer, ids, completions = trainer.processing_class, [], []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = trainer.model.generate(
            **inputs, max_new_tokens=trainer.args.max_completion_length, do_sample=False, pad_token_id=0
        )
        ids.append(inputs["input_ids"][0].tolist())
        completions.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


@pytest.mark.parametrize("perturbation", ["gaussian", "low_rank"])
def test_it_evaluates_members_as_the_trainer_does(trainer, perturbation):
    options = {"perturbation": perturbation, "learning_rate": 0.05}
    mine, theirs = trainer(rollout_func=rollout, **options), trainer(**options)
    mine.train()
    theirs.train()
    if perturbation == "gaussian":
        assert_same(weights(mine.model), weights(theirs.model))
    for ours, others in zip(logs(mine), logs(theirs), strict=True):
        assert ours["reward"] == pytest.approx(others["reward"])
        assert ours["num_tokens"] == others["num_tokens"]
        assert ours["completions/mean_length"] == others["completions/mean_length"]
    assert mine.evaluate()["eval_reward"] == pytest.approx(theirs.evaluate()["eval_reward"])


def test_it_gets_each_prompt_once_and_the_trainer(trainer):
    seen = []

    def rollout_func(prompts, trainer):
        seen.append(prompts)
        assert not trainer.model.training
        count = len(prompts) * trainer.num_generations
        return {"prompt_ids": [[5]] * count, "completion_ids": [[10 + i, 2] for i in range(count)]}

    run = trainer(
        make_model().train(),
        rollout_func=rollout_func,
        num_generations=2,
        temperature=1.0,
        max_steps=1,
        reward_funcs=lambda completions, completion_ids, **kwargs: [float(ids[0]) for ids in completion_ids],
    )
    run.train()
    assert [len(prompts) for prompts in seen] == [2] * 4
    (log,) = logs(run)
    assert log["reward"] == 11.5 and log["completions/clipped_ratio"] == 0
    assert log["num_tokens"] == 4 * 4 * (1 + 2)


def test_it_may_return_one_completion_for_each_prompt_it_gets(trainer):
    """As GRPOTrainer's code has it: then it gets each prompt again, as often as completions are missing."""
    seen, scored = [], []

    def rollout_func(prompts, trainer):
        seen.append(list(prompts))
        first = 10 * len(seen)
        return {
            "prompt_ids": [[5]] * len(prompts),
            "completion_ids": [[first + i, 2] for i in range(len(prompts))],
            "logprobs": None,
            "logprob_token_ids": [[[1]]] * len(prompts),
            "board": [f"{first + i} of {prompt}" for i, prompt in enumerate(prompts)],
            "nothing": None,
        }

    def reward(prompts, completion_ids, board, nothing, **kwargs):
        assert "logprob_token_ids" not in kwargs
        assert board == [f"{ids[0]} of {prompt}" for ids, prompt in zip(completion_ids, prompts, strict=True)]
        scored.append((prompts, [ids[0] for ids in completion_ids], nothing))
        return [0.0] * 6

    options = {"num_generations": 3, "temperature": 1.0, "max_steps": 1}
    trainer(rollout_func=rollout_func, reward_funcs=reward, population_size=2, **options).train()
    a, b = seen[0]
    assert seen == [[a, b], [a, a, b, b]] * 2
    assert scored == [
        ([a, a, a, b, b, b], [10, 20, 21, 11, 22, 23], [None] * 6),
        ([a, a, a, b, b, b], [30, 40, 41, 31, 42, 43], [None] * 6),
    ]


def test_it_may_change_its_prompts(trainer):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "hi"}]}] * 2)
    seen = []

    def rollout_func(prompts, trainer):
        seen.append([len(prompt) for prompt in prompts])
        for prompt in prompts:
            prompt.append({"role": "assistant", "content": "a turn"})
        return {"prompt_ids": [[5]] * len(prompts), "completion_ids": [[70, 2]] * len(prompts)}

    def reward(prompts, **kwargs):
        assert [len(prompt) for prompt in prompts] == [1, 1]
        return [0.0, 0.0]

    run = trainer(rollout_func=rollout_func, reward_funcs=reward, train_dataset=rows, eval_dataset=rows, max_steps=1)
    run.train()
    run.evaluate()
    assert seen == [[1, 1]] * 5


def test_it_may_not_exit(trainer):
    def rollout_func(prompts, trainer):
        sys.exit(0)

    with pytest.raises(RuntimeError, match="`rollout_func` raised SystemExit: 0"):
        trainer(rollout_func=rollout_func).train()


def test_extra_fields_reach_the_rewards_and_an_env_mask_the_lengths(trainer):
    def rollout_func(prompts, trainer):
        return {
            "prompt_ids": [[5]] * len(prompts),
            "completion_ids": [[10, 11, 12, 2]] * len(prompts),
            "logprobs": [[0.0] * 4] * len(prompts),
            "env_mask": [[1, 0, 0, 1]] * len(prompts),
            "board": [f"board of {prompt}" for prompt in prompts],
        }

    def reward(prompts, completions, board, **kwargs):
        assert "env_mask" not in kwargs and "logprobs" not in kwargs
        assert board == [f"board of {prompt}" for prompt in prompts]
        return [float(torch.randn(())) for _ in completions]

    run = trainer(rollout_func=rollout_func, reward_funcs=reward, max_steps=1)
    run.train()
    assert logs(run)[0]["completions/mean_length"] == 2


def test_prompts_are_its_own_business(trainer):
    """Conversations without a chat template, longer than the model's context: it may do anything with them."""
    rows = [{"prompt": [{"role": "user", "content": "x" * 1000}], "answer": "a"}] * 2

    def rollout_func(prompts, trainer):
        assert prompts[0][0]["role"] == "user"
        return {"prompt_ids": [[5]] * len(prompts), "completion_ids": [[70, 71]] * len(prompts)}

    run = trainer(rollout_func=rollout_func, train_dataset=Dataset.from_list(rows), eval_dataset=None, max_steps=1)
    run.train()
    assert logs(run)[0]["completions/clipped_ratio"] == 1


def test_evaluations_need_as_many_completions(trainer):
    with pytest.raises(ValueError, match="`rollout_func` with `num_generations_eval=2`"):
        trainer(rollout_func=rollout, num_generations_eval=2, temperature=1.0)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"completion_ids": [[1]] * 2}, r"must return \['prompt_ids'\]"),
        (
            {"prompt_ids": [[1]] * 2, "completion_ids": [[1]] * 3},
            "returned 3 entries in 'completion_ids' for 2 prompts",
        ),
        ({"prompt_ids": [[1]] * 2, "completion_ids": [[1], []]}, "no tokens in 'completion_ids' for completion 1"),
        ({"prompt_ids": [[1]] * 2, "completion_ids": [[1]] * 2, "x": [1]}, "returned 1 entries in 'x'"),
    ],
)
def test_what_it_returns_is_checked(trainer, output, message):
    run = trainer(rollout_func=lambda prompts, trainer: output, reward_funcs=letters)
    with pytest.raises(ValueError, match=message):
        run.train()
