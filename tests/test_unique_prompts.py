"""Members, or antithetic pairs, that answer prompts of their own."""

import httpx
import numpy as np
import pytest
import torch
from conftest import assert_replays_and_resumes, assert_same, history, letters, logs, make_model, weights
from datasets import Dataset

from es_trainer.evolution import Member


WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
ROWS = Dataset.from_list([{"prompt": f"Say {word}" * (1 + row % 3)} for row, word in enumerate(WORDS)])
PAIRS = {"antithetic": True, "population_size": 6}  # three pairs with two prompts each: half of the rows
SINGLES = {"population_size": 3}
KINDS = {
    "pairs": PAIRS,
    "singles": SINGLES,
    "population batch": {**PAIRS, "perturbation": "low_rank"},
    "groups that part a pair": {**PAIRS, "perturbation": "low_rank", "population_batch_size": 3},
    "stacked weights": {**SINGLES, "population_batch_size": 2},
}


@pytest.fixture
def unique(trainer):
    """Make a trainer whose reward notes what members were asked and what they answered."""

    def make(model=None, **options):
        seen: list[tuple[list, list, list]] = []

        def reward(prompts, completions, completion_ids, **kwargs):
            seen.append((prompts, completion_ids, letters(completions)))
            return seen[-1][2]

        run = trainer(model, reward, **{"unique_prompts": True, "train_dataset": ROWS, **options})
        run.seen = seen
        return run

    return make


def of_rows(*rows: int) -> list[str]:
    return [ROWS[row]["prompt"] for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_asked_what(unique, kind):
    options = KINDS[kind] | {"evaluate_center": True, "shuffle_dataset": False, "max_steps": 2}
    run = unique(**options)
    run.train()
    together = 2 if options.get("antithetic") else 1
    askers = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    expected = []
    for step in (askers[:3], askers[3:]):
        expected += [of_rows(*rows) for rows in step for _ in range(together)] + [of_rows(*step[0])]  # and the center
    assert [prompts for prompts, *_ in run.seen] == expected
    tokens = np.cumsum([sum(map(len, prompts)) + sum(map(len, ids)) for prompts, ids, _ in run.seen])
    assert [log["num_tokens"] for log in logs(run)] == [tokens[len(expected) // 2 - 1], tokens[-1]]
    assert [log["epoch"] for log in logs(run)] == [0.5, 1.0]


def test_the_end_of_an_epoch_and_datasets_that_are_smaller_than_a_step(unique):
    options = {"population_size": 4, "shuffle_dataset": False, "num_prompts_per_step": 2, "max_steps": 3}
    options |= {"eval_dataset": None}
    run = unique(**options, train_dataset=ROWS.select(range(10)))
    run.train()
    asked = [prompts for prompts, *_ in run.seen]
    assert asked[4:8] == [of_rows(8), of_rows(9), of_rows(8), of_rows(9)]
    assert asked[8:] == asked[:4]
    run = unique(**options, train_dataset=ROWS.select(range(5)))
    run.train()
    assert [prompts for prompts, *_ in run.seen][:4] == [of_rows(0, 1), of_rows(2, 3), of_rows(4, 0), of_rows(1, 2)]
    run = unique(**options, train_dataset=ROWS.select(range(10)), dataloader_drop_last=True)
    run.train()
    assert len(run.seen) == 12 and all(len(prompts) == 2 for prompts, *_ in run.seen)
    with pytest.raises(ValueError, match="has 5 rows, fewer than the 8 of a batch .`num_prompts_per_step`"):
        unique(**options, train_dataset=ROWS.select(range(5)), dataloader_drop_last=True)


def test_steps_of_other_sizes_pass_over_rows(unique):
    run = unique(
        **{"population_size": 2, "population_size_schedule": {1: 4, 2: 6}, "shuffle_dataset": False, "max_steps": 3},
        **{"num_prompts_per_step": 2, "num_prompts_per_step_schedule": {2: 1}},
    )
    assert run.args.largest_num_rows == 8  # 4, 8, 6
    run.train()
    asked = [prompts for prompts, *_ in run.seen]
    assert asked[:2] == [of_rows(0, 1), of_rows(2, 3)]
    assert asked[2:6] == [of_rows(8), of_rows(9), of_rows(10), of_rows(11)]  # the rest of the epoch
    assert asked[6:] == [of_rows(row) for row in range(6)]


@pytest.mark.parametrize("options", [PAIRS, SINGLES])
def test_an_update_is_made_of_the_members_rewards(unique, options):
    run = unique(make_model(), **options, num_prompts_per_step=3, max_steps=1, sigma=0.1, learning_rate=0.1)
    before = weights(run.model)
    run.train()
    rewards = np.array([found for _, _, found in run.seen])
    size = len(rewards)
    (line,) = history(run.args.output_dir)
    fitness = rewards.mean(axis=1)
    if "antithetic" in options:
        # A pair is compared on its own prompts: half of its difference, with both signs
        half = (fitness[::2] - fitness[1::2]) / 2
        fitness = np.stack([half, -half], axis=1).ravel()
        assert line["rewards"] == pytest.approx(fitness + rewards.mean())
    else:
        assert line["rewards"] == pytest.approx(fitness)
    utilities = (fitness - fitness.mean()) / fitness.std()
    assert line["utilities"] == pytest.approx(utilities)
    (log,) = logs(run)
    assert log["reward"] == pytest.approx(rewards.mean()) and log["reward_std"] == pytest.approx(fitness.std())
    other = unique(make_model(), **options, sigma=0.1)
    expected = {name: value.double() for name, value in before.items()}
    with other.backend.in_working_dtype():
        for seed, sign, utility in zip(line["seeds"], line["signs"], utilities, strict=True):
            other.optimizer.perturb(Member(seed, sign))
            for name, value in weights(other.model).items():
                expected[name] += 0.1 / size * utility * (value.double() - before[name]) / 0.1
        other.optimizer.restore()
    for name, value in weights(run.model).items():
        torch.testing.assert_close(value, expected[name].float(), rtol=0, atol=1e-6)
        assert not torch.equal(value, before[name])


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.0, "num_generations": 2}])
@pytest.mark.parametrize("size", [PAIRS, SINGLES])
def test_batches_of_members_answer_what_members_alone_do(unique, tmp_path, size, sampled):
    answers = []
    for batch in (1, 4, None):
        options = {**size, **sampled, "population_batch_size": batch, "perturbation": "low_rank"}
        run = unique(**options, output_dir=str(tmp_path / f"{batch}"), evaluate_center=True, max_steps=2)
        run.train()
        answers.append((run.seen, [line["utilities"] for line in history(run.args.output_dir)]))
    assert answers[0] == answers[1] == answers[2]
    assert len({str(ids) for _, ids, _ in answers[0][0]}) > 4


def test_pairs_share_the_random_numbers_of_sampling(unique):
    sampled = {"temperature": 1.0, "num_generations": 2, "sigma": 1e-9, "max_steps": 1}
    run = unique(**PAIRS, **sampled)
    run.train()
    answers = [ids for _, ids, _ in run.seen]
    assert answers[::2] == answers[1::2]  # by weights that are as good as equal
    assert len({str(ids) for ids in answers}) == 3
    assert all(first != second for ids in answers for first, second in [ids[:2]])


@pytest.mark.parametrize(
    "options",
    [
        {**PAIRS, "perturbation": "low_rank", "temperature": 1.0},
        {**PAIRS, "population_size_schedule": {1: 2, 3: 4}, "fitness_shaping": "prompt_centered"},
        {**SINGLES, "num_prompts_per_step_schedule": {2: 1}, "bf16": True, "master_weights": "none"},
    ],
)
def test_it_replays_and_resumes(trainer, tmp_path, options):
    options |= {"unique_prompts": True, "train_dataset": ROWS, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2, "evaluate_center": "master_weights" not in options}
    whole = trainer(make_model(), **options)
    whole.train()
    resumed = assert_replays_and_resumes(trainer, whole, tmp_path, **options)
    mine, theirs = ([line["rewards"] for line in history(run.args.output_dir)] for run in (resumed, whole))
    assert mine == theirs
    with pytest.raises(ValueError, match="`unique_prompts` is False but was True"):
        other = trainer(make_model(), **options | {"unique_prompts": False, "fitness_shaping": "z_score"})
        other.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")


def test_what_is_logged_of_pairs(unique):
    run = unique(**PAIRS, num_prompts_per_step=4, evaluate_center=True, max_steps=1, sigma=0.02)
    run.train()
    *members, center = [found for _, _, found in run.seen]
    members = np.array(members)
    (log,) = logs(run)
    differences = members[::2] - members[1::2]
    assert log["frac_reward_zero_std"] == np.mean(differences == 0) > 0
    of_pairs = 4 * np.square(differences.mean(axis=1)).sum() / 3
    residual = np.square(differences - differences.mean(axis=1, keepdims=True)).sum() / (3 * 3)
    assert log["signal"] == pytest.approx(1 - residual / of_pairs)
    assert log["reward/center"] == pytest.approx(np.mean(center))
    assert log["sigma_cost"] == pytest.approx(np.mean(center) - members[:2].mean())
    step_length = run.args.learning_rate / run.args.sigma
    assert log["expected_gain"] == pytest.approx(step_length * log["signal"] * log["reward_std"])


def test_what_is_logged_of_members_alone(unique):
    run = unique(**SINGLES, num_prompts_per_step=4, evaluate_center=True, max_steps=1)
    run.train()
    *members, center = [found for _, _, found in run.seen]
    members = np.array(members)
    (log,) = logs(run)
    assert "frac_reward_zero_std" not in log
    of_members = 4 * np.var(members.mean(axis=1), ddof=1)
    residual = np.var(members, axis=1, ddof=1).mean()
    assert log["signal"] == pytest.approx(1 - residual / of_members)
    assert log["sigma_cost"] == pytest.approx(np.mean(center) - members[0].mean())


def test_several_rewards_are_brought_to_one_scale(trainer):
    def small(completions, **kwargs):
        return [value / 1000 for value in letters(completions)]

    def lengths(completions, **kwargs):
        return [float(len(completion.split())) for completion in completions]

    seen = []

    def noted(of):
        def reward(completions, **kwargs):
            seen.append(of(completions))
            return seen[-1]

        return reward

    options = {"unique_prompts": True, "train_dataset": ROWS, "max_steps": 1, "fitness_shaping": "none"}
    options |= {"multi_objective_aggregation": "normalize_then_sum", "sigma": 0.1}
    run = trainer(reward_funcs=[noted(small), noted(lengths)], **PAIRS, **options)
    run.train()
    expected = 0.0
    for rewards in (np.array(seen[::2]), np.array(seen[1::2])):
        half = (rewards[::2] - rewards[1::2]).mean(axis=1) / 2
        expected = expected + half / np.sqrt(np.mean(half**2))
    (line,) = history(run.args.output_dir)
    assert line["utilities"][::2] == pytest.approx(expected)
    assert line["utilities"][1::2] == pytest.approx(-expected)


def test_a_rollout_func_gets_the_prompts_of_its_member(unique):
    asked = []

    def rollout(prompts, trainer):
        asked.append(prompts)
        made = trainer.generate(prompts)
        return {key: [one[key] for one in made] for key in ("prompt_ids", "completion_ids")}

    for options in (PAIRS, {**PAIRS, "perturbation": "low_rank"}):
        mine = unique(**options, rollout_func=rollout, max_steps=2)
        mine.train()
        theirs = unique(**options, max_steps=2)
        theirs.train()
        assert asked == [prompts for prompts, *_ in theirs.seen]
        assert [log["reward"] for log in logs(mine)] == [log["reward"] for log in logs(theirs)]
        assert [log["num_tokens"] for log in logs(mine)] == [log["num_tokens"] for log in logs(theirs)]
        asked.clear()


@pytest.mark.parametrize("kind", ["pairs", "population batch"])
def test_programs_get_the_rows_of_their_member(trainer, kind):
    asked = []

    def program(example, endpoint):
        with httpx.Client(headers={"Authorization": f"Bearer {endpoint.api_key}"}, timeout=60) as client:
            asked_for = {"model": endpoint.model, "prompt": example["prompt"]}
            reply = client.post(f"{endpoint.base_url}/completions", json=asked_for).json()
        asked.append((endpoint.model, example["prompt"], reply["choices"][0]["text"]))
        return letters([asked[-1][2]])[0]

    options = {"unique_prompts": True, "train_dataset": ROWS, "shuffle_dataset": False, "max_steps": 1, **KINDS[kind]}
    run = trainer(reward_funcs=None, agent_func=program, **options)
    run.train()
    plain = trainer(**options)
    plain.train()
    assert [log["reward"] for log in logs(run)] == pytest.approx([log["reward"] for log in logs(plain)])
    by_member = {f"member-{n}": sorted(of_rows(n // 2 * 2, n // 2 * 2 + 1)) for n in range(6)}
    found = {name: sorted(prompt for model, prompt, _ in asked if model == name) for name in by_member}
    assert found == by_member


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fitness_shaping": "prompt_z_score", **PAIRS}, "`fitness_shaping='prompt_z_score'` .* take 'z_score'"),
        ({"fitness_shaping": "prompt_centered"}, "`fitness_shaping='prompt_centered'` .* or antithetic=True"),
        ({"skip_settled_prompts": 0.5, **PAIRS}, "`skip_settled_prompts=0.5` .* too few to call it settled"),
    ],
)
def test_what_cannot_be(config, options, said):
    with pytest.raises(ValueError, match=said):
        config(unique_prompts=True, **options)


def test_with_one_prompt_for_all_it_is_what_it_was(trainer):
    same = Dataset.from_list([{"prompt": "Say one"}])
    options = {"train_dataset": same, "num_prompts_per_step": 1, "population_size": 4}
    mine, theirs = trainer(unique_prompts=True, **options), trainer(**options)
    mine.train()
    theirs.train()
    assert_same(weights(mine.model), weights(theirs.model))
