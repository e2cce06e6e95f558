"""`reward_funcs`, `reward_processing_classes` and `reward_weights`, as GRPOTrainer documents them."""

import asyncio
import functools
import sys
import threading
import time
from inspect import signature

import numpy as np
import pytest
import torch
from conftest import letters, logs, make_judge, make_tokenizer
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.rewards import get_soft_overlong_punishment

from es_trainer import ESTrainer


@pytest.fixture(scope="module")
def judge_folder(model_folder) -> str:
    return f"{model_folder}/judge"


def answers(trainer: ESTrainer) -> list[str]:
    prompt_ids = trainer.engine.tokenize(list(trainer.eval_dataset["prompt"]))
    return [completion.text for completion in trainer.engine.generate(prompt_ids, seed=0)]


def verdict(judge, text: str) -> float:
    """What the model says of one text, without padding."""
    ids = make_tokenizer()(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        return judge(**ids).logits.item()


def test_a_reward_model_by_its_name(trainer, judge_folder, dataset):
    run = trainer(reward_funcs=judge_folder)
    expected = [verdict(make_judge(), p + c) for p, c in zip(dataset["prompt"], answers(run), strict=True)]
    assert len(set(expected)) > 1
    metrics = run.evaluate()
    assert metrics["eval_rewards/judge/mean"] == pytest.approx(np.mean(expected), rel=1e-5)
    run.train()
    assert all(log["rewards/judge/std"] > 0 for log in logs(run))


def test_a_reward_model_reads_conversations_by_the_template_of_its_tokenizer(trainer):
    rows = [{"prompt": [{"role": "user", "content": word}]} for word in ("one", "three")]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    # What a template says is all: nothing is put before it
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("a").input_ids[0] == 1
    run = trainer(reward_funcs=make_judge(), reward_processing_classes=tokenizer, eval_dataset=Dataset.from_list(rows))
    texts = [f"[user]{w}[assistant]{a}" for w, a in zip(("one", "three"), answers(run), strict=True)]
    expected = np.mean([verdict(make_judge(), text) for text in texts])
    assert run.evaluate()["eval_reward"] == pytest.approx(expected, rel=1e-5)


def test_models_and_functions_mixed(trainer, judge_folder, dataset):
    async def applies_to_some(completions, **kwargs):
        return [1.0 if row % 2 else None for row in range(len(completions))]

    given = [judge_folder, letters, make_judge(), applies_to_some]
    run = trainer(
        reward_funcs=given,
        reward_processing_classes=[None, None, make_tokenizer(), None],
        reward_weights=[1.0, 2.0, 0.5, 3.0],
    )
    assert given[0] == judge_folder, "the caller's list was changed"
    metrics = run.evaluate()
    texts = answers(run)
    judged = [verdict(make_judge(), p + c) for p, c in zip(dataset["prompt"], texts, strict=True)]
    expected = 1.5 * np.mean(judged) + 2 * np.mean(letters(texts)) + 3 * 0.5
    assert metrics["eval_reward"] == pytest.approx(expected, rel=1e-5)
    names = ["judge", "letters", "LlamaForSequenceClassification", "applies_to_some"]
    assert all(f"eval_rewards/{name}/mean" in metrics for name in names)
    assert metrics["eval_rewards/applies_to_some/mean"] == 1.0


def test_a_reward_model_pads_with_what_it_takes_for_padding(trainer):
    tokenizer, judge = make_tokenizer(), make_judge()
    tokenizer.pad_token = None
    judge.config.pad_token_id = 5
    trainer(reward_funcs=judge, reward_processing_classes=tokenizer)
    assert tokenizer.pad_token == "</s>" and judge.config.pad_token_id == tokenizer.eos_token_id


def test_a_reward_model_does_not_change(trainer):
    judge = make_judge()
    trainer(reward_funcs=[judge], reward_processing_classes=[make_tokenizer()]).train()
    assert all(torch.equal(p, q) for p, q in zip(judge.parameters(), make_judge().parameters(), strict=True))


def test_async_functions_run_together_and_always_in_one_loop(trainer):
    loops, spans = set(), []

    class Judge:
        async def __call__(self, completions, seconds=0.15, **kwargs):
            loops.add(asyncio.get_running_loop())
            start = time.perf_counter()
            await asyncio.sleep(seconds)
            spans.append((start, time.perf_counter()))
            return [0.5] * len(completions)

    async def other(completions, seconds=0.1, **kwargs):
        await asyncio.sleep(seconds)
        return await Judge()(completions, seconds)

    def blocking(completions, **kwargs):
        time.sleep(0.1)
        return letters(completions)

    run = trainer(reward_funcs=[Judge(), blocking, functools.partial(other, seconds=0.05)], max_steps=2)
    run.train()
    run.evaluate()
    assert len(loops) == 1
    assert logs(run)[0]["rewards/Judge/mean"] == logs(run)[0]["rewards/other/mean"] == 0.5
    (first_start, first_end), (second_start, _) = sorted(spans[:2])
    assert second_start < first_end
    # One after another they would take 0.35 seconds for each of 4 members
    assert all(log["reward_seconds"] < 4 * 0.3 for log in logs(run))


def test_an_async_function_that_raises_is_named(trainer):
    async def fragile(**kwargs):
        raise ConnectionError("no judge")

    with pytest.raises(RuntimeError, match="'fragile' raised ConnectionError: no judge"):
        trainer(reward_funcs=[letters, fragile]).train()


@pytest.mark.parametrize("log_completions", [False, True])
def test_rows_are_what_the_dataset_has_whatever_functions_did_to_them(trainer, log_completions):
    seen = []

    def judge(prompts, completions, refs, **kwargs):
        for prompt, completion, ref in zip(prompts, completions, refs, strict=True):
            prompt.append(completion[0])
            ref.pop()
        seen.append(([len(prompt) for prompt in prompts], [len(ref) for ref in refs]))
        return letters(completions)

    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "hi"}], "refs": ["a", "b", "c"]}] * 2)
    options = {"train_dataset": rows, "eval_dataset": rows, "num_generations": 2, "temperature": 1.0, "max_steps": 1}
    run = trainer(reward_funcs=judge, log_completions=log_completions, **options)
    run.train()
    run.evaluate()
    assert seen == [([2] * 4, [2] * 4)] * 5


def test_a_function_that_exits_does_not_end_training_as_if_it_were_done(trainer):
    def grader(completions, **kwargs):
        exec("exit()", {"exit": sys.exit})  # what the model wrote

    with pytest.raises(RuntimeError, match="'grader' raised SystemExit"):
        trainer(reward_funcs=grader).train()


def test_async_functions_end_with_the_training_that_waits_for_them(trainer):
    """Four members generate together: one fails, and the others are not asked about any more."""
    begun, running, ended = [], threading.Event(), threading.Event()

    async def judge(completions, **kwargs):
        begun.append(completions)
        running.set()
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    def fragile(completions, **kwargs):
        assert running.wait(10)  # it may take its thread a while to begin
        assert len(scored) < 3, "no more"
        scored.append(completions)
        return [0.0] * len(completions)

    scored = []
    run = trainer(reward_funcs=[judge, fragile], perturbation="low_rank", max_steps=1)
    with pytest.raises(RuntimeError, match="'fragile' raised AssertionError: no more"):
        run.train()
    assert len(scored) == 3 and ended.wait(10)
    assert len(begun) == 1
    deadline = time.monotonic() + 10
    while run.scorer._caller._running and time.monotonic() < deadline:  # its loop takes note of it in another thread
        time.sleep(0.01)
    assert not run.scorer._caller._running


def test_what_is_public_as_in_grpo(trainer, judge_folder):
    given = [judge_folder, letters, get_soft_overlong_punishment(8, 4)]
    run = trainer(reward_funcs=given, reward_weights=[1.0, 0.1, 2.0])
    judge, *functions = run.reward_funcs
    assert isinstance(judge, LlamaForSequenceClassification) and functions == given[1:]
    assert run.reward_func_names == ["judge", "letters", "soft_overlong_punishment_reward"]
    assert isinstance(run.reward_processing_classes[0], PreTrainedTokenizerBase)
    assert run.reward_processing_classes[1:] == [None, None]
    assert run.reward_weights.tolist() == [1.0, 0.1, 2.0]


def test_weights_may_change_in_training(trainer):
    run = trainer(reward_funcs=[letters, lambda completions, **kwargs: [1.0] * len(completions)])
    before = run.evaluate()["eval_reward"]
    run.reward_weights[1] = 3.0
    assert run.evaluate()["eval_reward"] == pytest.approx(before + 2.0)


def test_the_signature_is_that_of_grpo(trainer):
    mine, theirs = (list(signature(kind.__init__).parameters) for kind in (ESTrainer, GRPOTrainer))
    assert [name for name in mine if name in theirs] == theirs
    trainer(tools=None, environment_factory=None)


def test_a_reward_is_missing(model_folder, config):
    with pytest.raises(ValueError, match="`reward_funcs=None` is not valid: there is no reward"):
        ESTrainer(model_folder, args=config())


def test_an_async_function_has_to_return_as_many_rewards(trainer):
    async def short(completions, **kwargs):
        return [0.0]

    with pytest.raises(ValueError, match="'short' returned 1 rewards for 2 completions"):
        trainer(reward_funcs=short).train()


@pytest.mark.parametrize("classes", [[None], [None, None, None]])
def test_as_many_processing_classes_as_reward_functions(trainer, classes):
    with pytest.raises(ValueError, match=r"`reward_processing_classes` has \d entries for 2 reward functions"):
        trainer(reward_funcs=[letters, letters], reward_processing_classes=classes)


def test_wrong_number_of_weights_is_found_before_models_are_loaded(trainer):
    with pytest.raises(ValueError, match="`reward_weights` has 3 entries for 2 reward functions"):
        trainer(model="no/such-model", reward_funcs=["no/such-judge", letters], reward_weights=[1, 2, 3])


def test_rewards_that_apply_to_nothing_are_warned_of_once(trainer, caplog):
    def of_one_prompt(prompts, completions, **kwargs):
        return [float(len(c)) if p == "Say one" else None for p, c in zip(prompts, completions, strict=True)]

    run = trainer(reward_funcs=of_one_prompt, num_prompts_per_step=6)
    with caplog.at_level("WARNING"):
        run.train()
    assert caplog.text.count("No reward function applies to some completions") == 1
    assert all(log["reward"] is not None for log in logs(run))
