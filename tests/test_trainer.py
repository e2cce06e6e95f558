import asyncio
import dataclasses
import json
import logging
import re
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import assert_same, logs, make_model, make_tokenizer, weights
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    MambaConfig,
    MambaForCausalLM,
    TrainerCallback,
)

from es_trainer import ESTrainer, replay
from es_trainer.backends.servers import Servers
from es_trainer.engines import population_batch
from es_trainer.engines.vllm_dispatch import Job
from es_trainer.engines.vllm_servers import Done


# ---- training ----


def test_it_learns(trainer):
    trainer = trainer(population_size=16, learning_rate=0.05, max_steps=15, num_prompts_per_step=6)
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    assert after > before + 0.15


@pytest.mark.parametrize(
    "options",
    [
        {"antithetic": True},
        {"es_optimizer": "adam"},
        {"fitness_shaping": "prompt_z_score"},
        {"fitness_shaping": "prompt_centered"},
    ],
)
def test_it_learns_by_every_variant(trainer, options):
    learning_rate = 0.02 if options.get("es_optimizer") == "adam" else 0.05
    trainer = trainer(population_size=16, learning_rate=learning_rate, max_steps=15, num_prompts_per_step=6, **options)
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before + 0.1


def test_same_seed_same_weights_and_another_seed_others(trainer):
    runs = []
    for seed in (1, 1, 2):
        run = trainer(seed=seed)
        run.train()
        runs.append(weights(run.model))
    assert_same(runs[1], runs[0])
    assert not torch.equal(runs[2]["model.norm.weight"], runs[0]["model.norm.weight"])


def test_generation_batch_size_does_not_change_the_run(trainer):
    runs = []
    for size in (None, 1, 3):
        run = trainer(generation_batch_size=size, num_generations=2, temperature=1.0)
        run.train()
        runs.append(weights(run.model))
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])


def test_every_member_answers_the_same_prompts_of_the_step(trainer):
    seen = []

    def spy(prompts, completions, trainer_state, **kwargs):
        seen.append((trainer_state.global_step, tuple(prompts)))
        return [float(len(seen))] * len(prompts)

    trainer(reward_funcs=spy, max_steps=6, gradient_accumulation_steps=2, per_device_train_batch_size=1).train()
    steps = [{prompts for step, prompts in seen if step == k} for k in range(6)]
    assert all(len(prompts) == 1 for prompts in steps)
    assert all(len(prompts) == 2 for (prompts,) in steps)
    first_epoch = [prompt for (prompts,) in steps[:3] for prompt in prompts]
    second_epoch = [prompt for (prompts,) in steps[3:] for prompt in prompts]
    assert sorted(first_epoch) == sorted(second_epoch) and len(set(first_epoch)) == 6
    assert first_epoch != second_epoch


def test_shuffle_dataset_false_keeps_the_order(trainer, dataset):
    seen = []

    def spy(prompts, **kwargs):
        seen.extend(prompts)
        return [0.0] * len(prompts)

    run = trainer(reward_funcs=spy, max_steps=3, shuffle_dataset=False, population_size=2)
    run.train()
    assert list(dict.fromkeys(seen)) == dataset["prompt"]
    seen.clear()
    args = dataclasses.replace(run.args, shuffle_dataset=True, seed=1)
    ESTrainer(make_model(), spy, args, dataset, processing_class=run.processing_class).train()
    assert sorted(set(seen)) == sorted(dataset["prompt"])
    assert list(dict.fromkeys(seen)) != dataset["prompt"]


def test_iterable_datasets(trainer, dataset):
    stream = dataset.to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    run = trainer(train_dataset=stream)
    run.train()
    assert run.state.global_step == 3


def test_conversational_prompts(trainer):
    rows = [{"prompt": [{"role": "user", "content": word}]} for word in ("one", "two")]
    seen = []

    def spy(prompts, completions, **kwargs):
        seen.extend(completions)
        return [float(len(completion[0]["content"])) for completion in completions]

    dataset = Dataset.from_list(rows)
    trainer(reward_funcs=spy, train_dataset=dataset, eval_dataset=dataset, max_steps=1).train()
    assert all(len(completion) == 1 and completion[0]["role"] == "assistant" for completion in seen)


@pytest.mark.parametrize("perturbation", ["gaussian", "low_rank"])
def test_reward_functions_run_on_the_main_thread_in_training_and_evaluation(trainer, perturbation):
    """Timers, event loops, connections and whatever else belongs to a thread are the same in both."""
    threads = []

    def spy(completions, **kwargs):
        threads.append(threading.current_thread())
        return [0.0] * len(completions)

    run = trainer(reward_funcs=spy, max_steps=1, perturbation=perturbation)
    run.train()
    run.evaluate()
    assert len(threads) == 4 + 1 and set(threads) == {threading.main_thread()}


def test_async_rewards_are_computed_while_the_next_member_generates(trainer):
    generated, judged = [], []

    async def judge(completions, **kwargs):
        judged.append(len(generated))
        while judged[-1] < 4 and len(generated) == judged[-1]:
            await asyncio.sleep(0.01)
        return [0.0] * len(completions)

    run = trainer(reward_funcs=judge, max_steps=1)
    generate = run.engine.generate_each
    run.engine.generate_each = lambda *args, **kwargs: generated.append(generate(*args, **kwargs)) or generated[-1]
    run.train()  # without end if nothing is generated while the judge waits for it
    assert judged == [1, 2, 3, 4]


@pytest.mark.parametrize("perturbation", ["gaussian", "low_rank"])
def test_reward_functions_that_ask_the_model_meet_always_the_same_weights(trainer, perturbation):
    seen, members = [], []

    def spy(completions, **kwargs):
        time.sleep(0.05)
        seen.append(run.model.model.norm.weight[0].item())
        return [0.0] * len(completions)

    run = trainer(reward_funcs=spy, max_steps=1, perturbation=perturbation)
    unperturbed = run.model.model.norm.weight[0].item()
    if perturbation == "gaussian":  # written into the weights one at a time
        for member in run.optimizer.ask():
            run.optimizer.perturb(member)
            members.append(run.model.model.norm.weight[0].item())
        run.optimizer.restore()
    else:  # all at once, beside the weights
        members = [unperturbed] * 4
    run.train()
    assert seen == members


def test_sampling_gives_all_members_the_same_luck(trainer):
    """With no noise to speak of, all members are the same model and sample the same completions."""
    seen = []

    def spy(completions, **kwargs):
        seen.append(tuple(completions))
        return [0.0] * len(completions)

    trainer(reward_funcs=spy, sigma=1e-12, temperature=1.0, num_generations=3, max_steps=2).train()
    assert len(set(seen[:4])) == 1 and len(set(seen[4:])) == 1
    assert set(seen[:4]) != set(seen[4:])


@pytest.mark.parametrize("schedule", ["linear", "constant_with_warmup", "constant"])
def test_learning_rate_schedules(trainer, schedule):
    run = trainer(lr_scheduler_type=schedule, warmup_steps=2, max_steps=4, learning_rate=0.1)
    run.train()
    rates = [log["learning_rate"] for log in logs(run)]
    norms = [log["update_norm"] for log in logs(run)]
    if schedule == "constant":
        assert rates == [0.1] * 4
    else:
        assert rates[0] == 0.0 and norms[0] == 0.0
        assert rates[2] == 0.1
    if schedule == "linear":
        assert rates[3] == pytest.approx(0.05)


def test_tied_weights_are_perturbed_once(model_folder, trainer):
    run = trainer(make_model(tie=True))
    names = [shard.name for shard in run.optimizer.weights.shards]
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    run.train()
    assert run.model.lm_head.weight is run.model.model.embed_tokens.weight
    untied = trainer(make_model(tie=False))
    assert "lm_head.weight" in [shard.name for shard in untied.optimizer.weights.shards]


def test_frozen_parameters_never_change(trainer, tmp_path):
    model = make_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = weights(model)
    run = trainer(model, bf16=True)
    run.train()
    run.save_model(str(tmp_path / "out"))
    after = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


# ---- precision ----


@pytest.mark.parametrize(
    ("given", "options", "working"),
    [
        (torch.float32, {"bf16": True}, torch.bfloat16),
        (torch.float32, {"fp16": True}, torch.float16),
        (torch.float32, {"bf16": False}, torch.float32),
        (torch.bfloat16, {"bf16": True}, torch.bfloat16),
        (torch.bfloat16, {"bf16": False}, torch.bfloat16),
    ],
)
def test_working_and_saved_dtypes(trainer, tmp_path, given, options, working):
    run = trainer(make_model(dtype=given), **options)
    run.train()
    assert {parameter.dtype for parameter in run.model.parameters()} == {given}
    with run.optimizer.weights.in_working_dtype():
        assert {parameter.dtype for parameter in run.model.parameters()} == {working}
        assert run.model(torch.tensor([[1]])).logits.dtype == working  # no autocast, which gives float32
        run.save_model(str(tmp_path / "out"))
        assert {parameter.dtype for parameter in run.model.parameters()} == {working}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert saved.dtype == given
    for shard in run.optimizer.weights.shards:
        assert torch.equal(saved.get_parameter(shard.name).data.flatten(), shard.master.to(given))


def test_a_model_named_by_a_string_is_loaded_in_float32(trainer, tmp_path):
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    assert trainer(str(tmp_path / "model"), bf16=False).model.dtype == torch.float32
    run = trainer(str(tmp_path / "model"), bf16=False, model_init_kwargs={"dtype": "bfloat16"})
    assert run.model.dtype == torch.bfloat16


@pytest.mark.parametrize("master_weights", ["host", "none"])
def test_other_places_for_the_master(trainer, master_weights):
    run, reference = trainer(master_weights=master_weights), trainer()
    run.train()
    reference.train()
    for name, parameter in reference.model.named_parameters():
        torch.testing.assert_close(run.model.get_parameter(name), parameter, rtol=0, atol=1e-4)


# ---- what is logged ----


def test_metrics(trainer, dataset):
    def half(completions, **kwargs):
        return [0.5, None] * (len(completions) // 2)

    def count(completions, log_metric, **kwargs):
        log_metric("count", len(completions))
        return [float(len(completion)) for completion in completions]

    run = trainer(reward_funcs=[half, count], reward_weights=[2.0, 1.0], max_steps=2)
    run.train()
    first, second = logs(run)
    for log in (first, second):
        assert log["loss"] == -log["reward"]
        assert log["reward_min"] <= log["reward"] <= log["reward_max"]
        assert log["rewards/half/mean"] == 0.5 and log["rewards/half/std"] == 0.0
        assert log["reward"] == pytest.approx(0.5 + log["rewards/count/mean"])  # half applies to half of the rows
        assert 1 <= log["completions/mean_length"] <= 8
        assert 0 <= log["completions/clipped_ratio"] <= 1
        assert log["count"] == 2.0
        assert log["update_norm"] > 0 and log["distance_from_start"] > 0
        assert all(log[f"{part}_seconds"] >= 0 for part in ("generation", "reward", "noise", "update"))
        assert log["tokens_per_second"] > 0
        assert "grad_norm" not in log
    assert second["num_tokens"] > first["num_tokens"] > 4 * 2 * 8
    assert second["distance_from_start"] > first["distance_from_start"]


def test_seconds_of_servers_that_work_side_by_side(trainer, monkeypatch):
    """Members that four servers have evaluated in ten seconds each, after a second for the noise."""
    run = trainer(population_size=8)

    class Engine(type(run.engine)):
        def evaluate(self, members, sigma, num_prompts, do, splits, repeats):
            for number in range(len(members)):
                job = Job((number,), range(num_prompts))
                yield Done(job, f"http://server-{number % 4}", do(job, self), seconds=10.0, noise_seconds=1.0)

    run.engine.__class__ = Engine
    run.backend.__class__ = Servers
    run.training_step(run.model, [{"prompt": "Say one"}, {"prompt": "Say two"}])
    assert run.recorder._metrics["generation_seconds"] == 20.0
    assert run.recorder._metrics["noise_seconds"] == pytest.approx(2.0, abs=0.5)  # with that for `restore`


def test_logs_are_means_since_the_last_log(trainer):
    every, second = trainer(max_steps=4, logging_steps=1), trainer(max_steps=4, logging_steps=2)
    every.train()
    second.train()
    assert [log["reward"] for log in logs(second)] == [
        np.mean([a["reward"], b["reward"]]) for a, b in zip(logs(every)[::2], logs(every)[1::2], strict=True)
    ]
    assert [log["num_tokens"] for log in logs(second)] == [log["num_tokens"] for log in logs(every)[1::2]]


def test_truncated_completions_can_be_masked(trainer):
    ends = [2, *range(60, 90)]  # so many that some completions end

    def cut(completion_ids, **kwargs):
        return [float(ids[-1] not in ends) for ids in completion_ids]

    rewards = []
    for mask in (False, True):
        model = make_model()
        model.generation_config.eos_token_id = ends
        run = trainer(model, reward_funcs=cut, mask_truncated_completions=mask, max_steps=1, num_prompts_per_step=6)
        run.train()
        (log,) = logs(run)
        assert 0 < log["completions/clipped_ratio"] < 1
        rewards.append(log["reward_max"])
    assert rewards[0] > 0 == rewards[1]


@pytest.mark.parametrize("shaping", ["z_score", "prompt_centered", "none"])
def test_members_that_lost_a_prompt_are_compared_on_the_others(trainer, shaping):
    """All members get one for the first prompt and nothing for the second, where that counts."""
    calls = []

    def reward(prompts, **kwargs):
        calls.append(prompts)
        return [1.0, None] if len(calls) % 3 == 1 else [1.0, 0.0]

    run = trainer(reward_funcs=reward, fitness_shaping=shaping, max_steps=2)
    before = weights(run.model)
    run.train()
    assert_same(weights(run.model), before)
    for log in logs(run):
        assert log["reward"] == log["reward_max"] == log["reward_min"] == 0.5 and log["reward_std"] == 0.0


def test_a_penalty_of_the_largest_float_is_a_reward(trainer):
    def penalty(completions, **kwargs):
        return [-sys.float_info.max if len(text) % 2 else float(len(text)) for text in completions]

    run = trainer(reward_funcs=penalty, max_steps=2)
    before = weights(run.model)
    run.train()
    assert all(log["update_norm"] > 0 for log in logs(run))
    assert all(torch.isfinite(after).all() for after in weights(run.model).values())
    assert not torch.equal(weights(run.model)["model.norm.weight"], before["model.norm.weight"])


def test_all_completions_masked_is_no_update(trainer, caplog):
    run = trainer(reward_funcs=lambda completions, **kw: [None] * len(completions), max_steps=2)
    before = weights(run.model)
    run.train()
    assert_same(weights(run.model), before)
    assert logs(run)[0]["reward"] is None and logs(run)[0]["reward_max"] is None
    json.dumps(run.state.log_history, allow_nan=False)


def test_equal_fitness_is_no_update_and_one_warning(trainer, caplog):
    logging.getLogger("transformers").propagate = True
    run = trainer(reward_funcs=lambda completions, **kwargs: [0.3] * len(completions), weight_decay=0.1)
    before = weights(run.model)
    with caplog.at_level("WARNING"):
        run.train()
    assert_same(weights(run.model), before)
    assert caplog.text.count("all members have the same fitness") == 1
    assert run.state.global_step == 3


def test_table_of_completions(trainer, capsys):
    def scored(completions, log_extra, **kwargs):
        log_extra("note", ["noted"] * len(completions))
        return [0.25] * len(completions)

    trainer(reward_funcs=scored, log_completions=True, num_completions_to_print=1, max_steps=1).train()
    printed = capsys.readouterr().out
    assert "Step 1: completions of the best member" in printed
    assert printed.count("Say ") == 1 and "0.25" in printed and "noted" in printed


def test_progress_inside_a_step(trainer, capsys):
    totals = []

    class Watch(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            totals.append(state.global_step)

    def slow(completions, **kwargs):
        time.sleep(0.12)  # the bar is drawn ten times a second at the most
        return [float(len(completion)) for completion in completions]

    trainer(reward_funcs=slow, disable_tqdm=False, callbacks=[Watch()], max_steps=2).train()
    shown = capsys.readouterr().err
    assert "Members" in shown and "3/4" in shown
    assert totals == [0] * 4 + [1] * 4


def test_trackers_get_the_metrics(trainer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer(report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {"train/reward", "train/reward_std", "train/rewards/letters/mean"} <= set(events.Tags()["scalars"])


# ---- evaluation, best model ----


def test_evaluation_uses_the_unperturbed_weights(trainer, reward, dataset):
    run = trainer(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    run.train()
    metrics = run.evaluate()
    engine = run.engine
    texts = [c.text for c in engine.generate(engine.tokenize(list(dataset["prompt"])), seed=0)]
    assert metrics["eval_reward"] == pytest.approx(np.mean(reward(texts)))
    assert metrics["eval_loss"] == -metrics["eval_reward"]
    assert {"eval_rewards/letters/mean", "eval_completions/mean_length", "eval_runtime"} <= metrics.keys()
    assert [log["step"] for log in run.state.log_history if "eval_reward" in log][:3] == [1, 2, 3]


def test_several_evaluation_sets(trainer, dataset):
    run = trainer(eval_dataset={"first": dataset.select([0]), "rest": dataset.select([1, 2])})
    assert {"eval_first_reward", "eval_rest_reward"} <= run.evaluate().keys()


@pytest.mark.parametrize("bf16", [False, True])
def test_best_model_is_loaded_at_the_end(trainer, tmp_path, bf16):
    run = trainer(
        bf16=bf16,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=6,
        learning_rate=1.0,  # so large that it does not get better all the time
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        save_total_limit=1,
    )
    run.train()
    rewards = [log["eval_reward"] for log in run.state.log_history if "eval_reward" in log]
    assert run.state.best_metric == max(rewards)
    assert int(np.argmax(rewards)) + 1 == run.state.best_global_step != 6
    assert run.evaluate()["eval_reward"] == pytest.approx(max(rewards))
    run.save_model(str(tmp_path / "out"))
    best = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    assert_same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), weights(best))
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def test_best_adapter_is_loaded_at_the_end(trainer):
    run = trainer(
        peft_config=adapter(),
        bf16=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=6,
        learning_rate=1.0,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
    )
    run.train()
    rewards = [log["eval_reward"] for log in run.state.log_history if "eval_reward" in log]
    assert max(rewards) > rewards[-1]
    assert run.evaluate()["eval_reward"] == pytest.approx(max(rewards))
    with run.optimizer.weights.in_working_dtype():
        before = weights(run.model)
        run.optimizer.perturb(run.optimizer.ask().members[0])
        run.optimizer.restore()
        assert_same(weights(run.model), before)


def test_early_stopping(trainer):
    run = trainer(
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=20,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
    )
    run.train()
    assert run.state.global_step == 3


# ---- PEFT ----


def adapter() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("bf16", [False, True])
def test_with_peft_only_the_adapter_is_trained_and_saved(trainer, model_folder, tmp_path, bf16):
    run = trainer(peft_config=adapter(), bf16=bf16, learning_rate=0.1)
    assert all("lora_" in shard.name for shard in run.optimizer.weights.shards)
    with run.optimizer.weights.in_checkpoint_dtype():
        before = weights(run.model)
    run.train()
    with run.optimizer.weights.in_checkpoint_dtype():
        after = weights(run.model)
    for name in after:
        assert torch.equal(after[name], before[name]) == ("lora_" not in name), name

    run.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert_same(weights(PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)), after)


def test_a_peft_model_trains_the_adapter_it_has(trainer):
    run = trainer(get_peft_model(make_model(), adapter()))
    run.train()
    assert all("lora_" in shard.name for shard in run.optimizer.weights.shards)
    with pytest.raises(ValueError, match="`PeftModel` together with a `peft_config`"):
        trainer(get_peft_model(make_model(), adapter()), peft_config=adapter())


def test_peft_runs_resume(trainer, tmp_path):
    options = {"peft_config": adapter(), "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "bf16": True}
    whole = trainer(**options)
    whole.train()
    resumed = trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(weights(resumed.model), weights(whole.model))


# ---- history ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"antithetic": True, "es_optimizer": "adam", "anchor_decay": 0.5, "weight_decay": 0.1, "bf16": True},
        {"master_weights": "none", "bf16": True},
        {"lr_scheduler_type": "linear", "warmup_steps": 1, "es_optimizer": "momentum"},
    ],
)
def test_the_history_rebuilds_the_weights(trainer, model_folder, tmp_path, options):
    run = trainer(**options)
    run.train()
    run.save_model(str(tmp_path / "out"))
    rebuilt = replay(model_folder, tmp_path / "run")
    assert_same(weights(rebuilt), weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))


def test_the_history_rebuilds_the_weights_after_steps_of_equal_fitness(trainer, model_folder, tmp_path):
    run = None

    def reward(completions, **kwargs):
        first = run.state.global_step in (0, 2)
        return [0.5 if first else float(sum(map(ord, text)) % 7) for text in completions]

    run = trainer(reward_funcs=reward, es_optimizer="adam", max_steps=4)
    run.train()
    assert [log["update_norm"] > 0 for log in logs(run)] == [False, True, False, True]
    run.save_model(str(tmp_path / "model"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same(weights(replay(model_folder, tmp_path / "run")), weights(saved))


def test_a_history_holds_what_updates_were_made_of(trainer, tmp_path):
    run = trainer()
    run.train()
    header, *steps = map(json.loads, (tmp_path / "run" / "history.jsonl").read_text().splitlines())
    assert header["config"]["sigma"] == 0.05
    assert header["parameters"]["model.norm.weight"] == [32]
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert len(step["seeds"]) == len(step["signs"]) == len(step["utilities"]) == 4
        assert step["learning_rate"] == 0.02
        assert step["metrics"]["reward"] is not None


def test_replay_stops_where_it_is_told(trainer, model_folder, tmp_path):
    run = trainer(save_strategy="steps", save_steps=2)
    run.train()
    rebuilt = replay(model_folder, tmp_path / "run" / "history.jsonl", steps=2)
    assert_same(weights(rebuilt), weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")))
    with pytest.raises(ValueError, match="steps=9.*3 updates"):
        replay(model_folder, tmp_path / "run", steps=9)


def test_replay_refuses_another_model(trainer, tmp_path):
    trainer().train()
    with pytest.raises(ValueError, match="another model.*shape"):
        replay(make_model(hidden_size=48), tmp_path / "run")


# ---- when things go wrong ----


def test_a_reward_that_raises_leaves_weights_clean_and_the_checkpoint_usable(trainer, tmp_path):
    calls = []

    def breaks(completions, trainer_state, **kwargs):
        calls.append(trainer_state.global_step)
        if calls.count(2) == 2:
            raise OSError("sandbox is gone")
        return [float(len(completion) + len(calls)) for completion in completions]

    run = trainer(reward_funcs=breaks, save_strategy="steps", save_steps=1, max_steps=5)
    with pytest.raises(RuntimeError, match="'breaks' raised OSError: sandbox is gone"):
        run.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert_same(weights(run.model), weights(saved))

    run = trainer(reward_funcs=lambda completions, **kw: [0.0, 1.0], save_strategy="steps", save_steps=1, max_steps=5)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 5


def test_an_error_in_generation_leaves_weights_clean(trainer, monkeypatch):
    run = trainer()
    before = weights(run.model)
    generate, calls = run.engine.generate_each, []

    def fails(*args):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return generate(*args)

    monkeypatch.setattr(run.engine, "generate_each", fails)
    with pytest.raises(torch.OutOfMemoryError):
        run.train()
    assert_same(weights(run.model), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_dataset": Dataset.from_dict({"prompt": []})}, "`train_dataset` is empty"),
        ({"train_dataset": Dataset.from_dict({"question": ["a"]})}, "no column 'prompt'.*question"),
        ({"eval_dataset": Dataset.from_dict({"question": ["a"]})}, "`eval_dataset` has no column 'prompt'"),
        ({"eval_dataset": {"hard": Dataset.from_dict({"prompt": []})}}, r"`eval_dataset\['hard'\]` is empty"),
        ({"reward_weights": [1.0, 2.0]}, "`reward_weights` has 2 entries for 1"),
        ({"train_dataset": Dataset.from_dict({"prompt": ["x" * 300]})}, "Prompt 0 has 300 tokens.*256"),
        ({"eval_dataset": Dataset.from_dict({"prompt": ["x" * 300]})}, "Prompt 0 has 300 tokens.*256"),
    ],
)
def test_what_cannot_work_is_refused_before_training(trainer, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(**changes)


def test_more_that_cannot_work(trainer, model_folder, dataset, reward, config):
    with pytest.raises(TypeError, match="`reward_funcs` has 3. Give a function"):
        trainer(reward_funcs=[reward, 3])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        trainer("/nowhere/to/be/found")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        trainer("./nowhere")
    model = make_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="All parameters of the model are frozen"):
        trainer(model)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a padding nor an end-of-sequence"):
        trainer(processing_class=tokenizer)
    with pytest.raises(TypeError, match="`processing_class` must be a tokenizer"):
        trainer(processing_class="gpt2")
    with pytest.raises(TypeError, match="`peft_config` must be"):
        trainer(peft_config={"r": 4})
    with pytest.raises(ValueError, match="model_init_kwargs"):
        trainer(make_model(), model_init_kwargs={"dtype": "bfloat16"})
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with pytest.raises(ValueError, match="es_optimizer"):
        ESTrainer(model_folder, reward, config(), dataset, optimizers=(optimizer, None))


def test_bad_settings_are_found_before_the_model_is_loaded(dataset, reward, config):
    with pytest.raises(ValueError, match="`reward_weights`"):
        ESTrainer("org/does-not-exist", reward, config(reward_weights=[1.0, 2.0]), dataset)
    with pytest.raises(ValueError, match="no column 'prompt'"):
        ESTrainer("org/does-not-exist", reward, config(), Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match=r"split over processes by Transformers \(tp_plan\).*zero3.yaml"):
        ESTrainer("org/does-not-exist", reward, config(model_init_kwargs={"tp_plan": "auto"}), dataset)


def test_pad_token_defaults_to_the_end_of_sequence(trainer):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    run = trainer(processing_class=tokenizer)
    assert run.processing_class.pad_token == "</s>"
    assert run.model.generation_config.pad_token_id == 2


def test_only_a_model_and_a_reward_are_needed(reward, dataset, tmp_path, monkeypatch):
    make_model(max_position_embeddings=1024).save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    trainer = ESTrainer(str(tmp_path / "tiny"), reward, train_dataset=dataset)
    assert trainer.args.output_dir == str(tmp_path / "tiny-ES")
    assert trainer.processing_class.chat_template is not None


def test_training_twice_goes_on(trainer):
    run = trainer()
    run.train()
    middle, seeds = weights(run.model), run.optimizer.ask()
    run.train()
    assert run.optimizer.updates == 6
    assert run.optimizer.ask() != seeds
    assert not torch.equal(run.model.model.norm.weight, middle["model.norm.weight"])


# ---- low-rank perturbations and population batches ----


def nothing_installed(model) -> bool:
    return not any(vars(module).keys() & {"forward", *module._parameters} for module in model.modules())


def fitness(folder) -> list[tuple]:
    """What a run's members got, without what the clock says."""
    _, *steps = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    keys = ("reward", "reward_std", "reward_max", "reward_min", "num_tokens", "completions/mean_length")
    return [(step["seeds"], step["utilities"], *(step["metrics"][key] for key in keys)) for step in steps]


def group_sizes(run: ESTrainer) -> list[int]:
    """The sizes of the groups that `run` evaluates from now on."""
    sizes, install = [], run.population_batch.install

    def recorded(members, sigma):
        sizes.append(len(members))
        return install(members, sigma)

    run.population_batch.install = recorded
    return sizes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"perturbation_rank": 2, "antithetic": True},
        {"es_optimizer": "adam", "learning_rate": 0.02},
        {"fitness_shaping": "centered_rank", "learning_rate": 0.1},
    ],
)
def test_it_learns_with_low_rank_perturbations(trainer, options):
    defaults = {"population_size": 16, "learning_rate": 0.05, "max_steps": 15, "num_prompts_per_step": 6}
    run = trainer(perturbation="low_rank", **{**defaults, **options})
    assert run.population_batch is not None
    before = run.evaluate()["eval_reward"]
    run.train()
    assert run.evaluate()["eval_reward"] > before + 0.1


@pytest.mark.parametrize("rank", [1, 3])
def test_perturbations_have_the_rank_that_is_asked_for(trainer, rank):
    run = trainer(perturbation="low_rank", perturbation_rank=rank, sigma=1.0)
    weight = run.model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    run.optimizer.perturb(run.optimizer.ask().members[0])
    assert torch.linalg.matrix_rank(weight.detach() - before, rtol=1e-4) == rank


def test_an_adapter_learns_with_low_rank_perturbations(trainer):
    options = {"population_size": 16, "learning_rate": 0.3, "sigma": 0.1, "max_steps": 15, "num_prompts_per_step": 6}
    run = trainer(perturbation="low_rank", peft_config=adapter(), **options)
    before, reward = weights(run.model), run.evaluate()["eval_reward"]
    run.train()
    assert run.evaluate()["eval_reward"] > reward + 0.05
    for name, value in weights(run.model).items():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 1.0, "num_generations": 2}, {"generation_kwargs": {"use_cache": False}}],
    ids=["greedy", "sampled", "without cache"],
)
@pytest.mark.parametrize(
    ("perturbation", "sizes"),
    [
        ("low_rank", [(1, None), (3, 5), (None, None), (9, 4)]),
        ("gaussian", [(1, None), (2, None), (4, 3)]),
    ],
)
def test_batch_sizes_do_not_change_the_run(trainer, tmp_path, perturbation, sizes, sampling):
    trained, told = [], []
    for population_batch_size, generation_batch_size in sizes:
        run = trainer(
            perturbation=perturbation,
            population_size=5,
            population_batch_size=population_batch_size,
            generation_batch_size=generation_batch_size,
            max_steps=2,
            **sampling,
        )
        run.train()
        trained.append(weights(run.model))
        told.append(fitness(tmp_path / "run"))
    assert len(told[0]) == 2 and all(any(utilities) for _, utilities, *_ in told[0])
    for mine, row in zip(trained[1:], told[1:], strict=True):
        assert row == told[0]
        assert_same(mine, trained[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"perturbation": "low_rank"}, [6]),
        ({"perturbation": "low_rank", "population_batch_size": 1}, [1] * 6),
        ({"perturbation": "low_rank", "population_batch_size": 4}, [4, 2]),
        ({"population_batch_size": 4}, [4, 2]),
        ({"population_batch_size": 9}, [6]),
        ({"population_batch_size": 1}, None),
        ({}, None),  # on CPU
    ],
)
def test_how_many_members_are_evaluated_together(trainer, options, expected):
    run = trainer(population_size=6, max_steps=1, **options)
    assert (run.population_batch is None) == (expected is None)
    if expected is not None:
        sizes = group_sizes(run)
        run.train()
        assert sizes == expected


@pytest.mark.parametrize("options", [{"perturbation": "low_rank"}, {"population_batch_size": 2}])
@pytest.mark.parametrize("bf16", [False, True])
def test_population_batches_leave_the_trained_weights(trainer, reward, dataset, tmp_path, options, bf16):
    run = trainer(bf16=bf16, eval_strategy="steps", eval_steps=1, **options)
    run.train()
    assert nothing_installed(run.model)
    run.save_model(str(tmp_path / "out"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for shard in run.optimizer.weights.shards:
        assert torch.equal(saved.get_parameter(shard.name).flatten(), shard.master), shard.name
    loaded = trainer(saved, bf16=bf16)
    with run.optimizer.weights.in_working_dtype(), loaded.optimizer.weights.in_working_dtype():
        for shard in run.optimizer.weights.shards:
            assert torch.equal(shard.working, shard.master.to(shard.working.dtype)), shard.name
        engine = loaded.engine
        texts = [c.text for c in engine.generate(engine.tokenize(list(dataset["prompt"])), seed=0)]
    assert run.evaluate()["eval_reward"] == pytest.approx(np.mean(reward(texts)))
    evaluated = [log["eval_reward"] for log in run.state.log_history if "eval_reward" in log]
    assert evaluated[2] == pytest.approx(np.mean(reward(texts)))


@pytest.mark.parametrize("options", [{"perturbation": "low_rank"}, {"population_batch_size": 2}])
def test_an_error_in_a_population_batch_leaves_weights_clean(trainer, monkeypatch, options):
    run = trainer(**options)
    before = weights(run.model)

    def fails(*args):
        assert not nothing_installed(run.model)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(run.engine, "generate_each", fails)
    with pytest.raises(torch.OutOfMemoryError):
        run.train()
    assert nothing_installed(run.model)
    assert_same(weights(run.model), before)


@pytest.mark.parametrize(
    ("options", "in_place"),
    [
        ({"perturbation": "low_rank"}, False),
        ({"perturbation": "low_rank", "perturbation_rank": 3, "bf16": True, "es_optimizer": "adam"}, False),
        ({"perturbation": "low_rank", "master_weights": "host", "bf16": True, "antithetic": True}, False),
        ({"perturbation": "low_rank", "master_weights": "none", "bf16": True}, False),
        ({"master_weights": "none", "population_batch_size": 2, "bf16": True}, False),
        ({"master_weights": "none", "population_batch_size": 1, "bf16": True}, True),
    ],
)
def test_the_history_rebuilds_the_weights_of_population_batches(trainer, model_folder, tmp_path, options, in_place):
    run = trainer(**options)
    run.train()
    run.save_model(str(tmp_path / "out"))
    _, *steps = map(json.loads, (tmp_path / "run" / "history.jsonl").read_text().splitlines())
    assert [step["in_place"] for step in steps] == [in_place] * 3
    rebuilt = weights(replay(model_folder, tmp_path / "run"))
    assert_same(rebuilt, weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))
    assert not torch.equal(rebuilt["model.norm.weight"], make_model().model.norm.weight)


@pytest.mark.parametrize("size", [1, 2])
def test_weights_without_a_master_drift_only_when_written_in_place(trainer, size):
    run = trainer(
        master_weights="none",
        bf16=True,
        population_batch_size=size,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
    )
    before = weights(run.model)
    run.train()
    name = "model.embed_tokens.weight"
    assert torch.equal(weights(run.model)[name], before[name]) == (size == 2)


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=259,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return MambaForCausalLM(config)


@pytest.mark.parametrize("options", [{"perturbation": "low_rank"}, {"population_batch_size": 2}])
def test_a_model_that_cannot_be_batched_is_evaluated_one_member_at_a_time(trainer, tmp_path, caplog, options):
    logging.getLogger("transformers").propagate = True
    options = {"master_weights": "none", "max_steps": 2, "sigma": 0.5, **options}
    options["reward_funcs"] = lambda completion_ids, **kwargs: [float(sum(ids)) for ids in completion_ids]
    with caplog.at_level("WARNING"):
        run = trainer(mamba(), **options)
        run.train()
    warnings = [record.message for record in caplog.records if "one at a time" in record.message]
    assert len(warnings) == 1
    assert re.search(r"`backbone\.layers\.0\S*` \(\w+\) with its parameter `\w+`", warnings[0])
    assert run.population_batch is None and nothing_installed(run.model)
    assert run.state.global_step == 2 and logs(run)[0]["update_norm"] > 0
    _, *steps = map(json.loads, (tmp_path / "run" / "history.jsonl").read_text().splitlines())
    assert all(step["in_place"] for step in steps)
    assert_same(weights(replay(mamba(), tmp_path / "run")), weights(run.model))


# 2 layers of keys and values of 2 heads of 8 numbers; the logits and two copies
TOKEN_BYTES, LOGITS_BYTES = 4 * 2 * 2 * 2 * 8, 259 * 3 * 4


def sequence_bytes(dataset) -> int:
    return TOKEN_BYTES * (max(map(len, dataset["prompt"])) + 8) + LOGITS_BYTES


@pytest.fixture
def memory(monkeypatch, caplog):
    """Say how many bytes may be taken."""
    logging.getLogger("transformers").propagate = True
    logging.Logger.warning_once.cache_clear()

    def set_bytes(number: int) -> None:
        monkeypatch.setattr(
            population_batch, "free_memory", lambda device: -int(-number // population_batch.FREE_SHARE)
        )

    with caplog.at_level("WARNING"):
        yield set_bytes


@pytest.mark.parametrize(("more", "expected"), [(100, [2] * 2), (-100, [1] * 4)])
@pytest.mark.parametrize("generation_batch_size", [None, 1])
def test_groups_are_as_large_as_memory_allows(trainer, memory, caplog, generation_batch_size, more, expected):
    prompts = Dataset.from_dict({"prompt": ["Say one", "Say two"]})
    options = {"perturbation": "low_rank", "train_dataset": prompts, "max_steps": 1}
    options["generation_batch_size"] = generation_batch_size
    reference = trainer(population_batch_size=2, **options)
    reference.train()
    run = trainer(**options)
    sequences = 2 * 2 if generation_batch_size is None else 1
    memory(2 * run.optimizer.weights.member_bytes() + sequences * sequence_bytes(prompts) + more)
    sizes = group_sizes(run)
    run.train()
    assert sizes == expected
    assert_same(weights(run.model), weights(reference.model))
    assert "Memory does not suffice" not in caplog.text


def test_groups_of_members_with_prompts_of_their_own_are_as_large(trainer, memory):
    prompts = Dataset.from_dict({"prompt": [f"Say {number}" for number in range(8)]})
    run = trainer(perturbation="low_rank", train_dataset=prompts, max_steps=1, unique_prompts=True)
    memory(2 * run.optimizer.weights.member_bytes() + 2 * 2 * sequence_bytes(prompts) + 100)
    sizes = group_sizes(run)
    run.train()
    assert sizes == [2] * 2


def test_sequences_that_do_not_fit_at_once_are_generated_one_after_another(trainer, memory, caplog):
    prompts = Dataset.from_dict({"prompt": ["Say one", "Say two", "Say six"]})
    options = {"perturbation": "low_rank", "train_dataset": prompts, "num_prompts_per_step": 3, "max_steps": 2}
    reference = trainer(**options)
    reference.train()
    run = trainer(**options)
    memory(run.optimizer.weights.member_bytes() + 2 * sequence_bytes(prompts) + 100)
    sizes, generate, batch_sizes = group_sizes(run), run.engine.generate_each, []

    def recorded(prompt_ids, seed, number, group, batch_size, progress):
        batch_sizes.append(batch_size)
        return generate(prompt_ids, seed, number, group, batch_size, progress)

    run.engine.generate_each = recorded
    run.train()
    assert sizes == [1] * 8 and batch_sizes == [2] * 8
    assert caplog.text.count("generated 2 at a time") == 1
    assert "`generation_batch_size`" in caplog.text
    assert_same(weights(run.model), weights(reference.model))


def test_evaluations_generate_what_fits(trainer, memory, dataset):
    run = trainer(perturbation="low_rank", num_generations_eval=2, temperature=0.7)
    assert run.args.per_device_eval_batch_size == 64
    all_at_once = run.evaluate()["eval_reward"]
    memory(run.optimizer.weights.member_bytes() + 5 * sequence_bytes(dataset) + 100)
    generate, batch_sizes = run.engine.generate_each, []

    def recorded(prompt_ids, seed, number, group, batch_size, progress):
        batch_sizes.append((len(prompt_ids[0]), batch_size))
        return generate(prompt_ids, seed, number, group, batch_size, progress)

    run.engine.generate_each = recorded
    assert run.evaluate()["eval_reward"] == pytest.approx(all_at_once)
    assert batch_sizes == [(6, 5)]  # one batch of all prompts, of which 5 sequences are generated at once


@pytest.mark.parametrize("generation_batch_size", [None, 1])
def test_no_memory_at_all_is_an_error(trainer, memory, generation_batch_size):
    run = trainer(perturbation="low_rank", generation_batch_size=generation_batch_size)
    before = weights(run.model)
    memory(0)
    with pytest.raises(ValueError, match="`max_completion_length=8`.*`population_batch_size`"):
        run.train()
    assert_same(weights(run.model), before)
    given = trainer(perturbation="low_rank", population_batch_size=3, max_steps=1)
    given.train()
    assert given.state.global_step == 1


@pytest.mark.parametrize("size", [None, 1, 3])
def test_callbacks_are_told_of_every_member_of_a_group(trainer, size):
    steps = []

    class Watch(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    trainer(perturbation="low_rank", population_batch_size=size, callbacks=[Watch()], max_steps=2).train()
    assert steps == [0] * 4 + [1] * 4


def test_reward_functions_see_one_member_at_a_time(trainer):
    seen = []

    def spy(prompts, completions, completion_ids, answer, **kwargs):
        seen.append((tuple(prompts), tuple(completions)))
        assert len(completions) == len(completion_ids) == len(answer) == 4
        return [float(len(completion)) for completion in completions]

    options = {"temperature": 1.0, "num_generations": 2, "max_steps": 1, "sigma": 0.3}
    trainer(perturbation="low_rank", reward_funcs=spy, **options).train()
    one_at_a_time = len(seen)
    trainer(perturbation="low_rank", population_batch_size=1, reward_funcs=spy, **options).train()
    assert one_at_a_time == 4 and len({completions for _, completions in seen}) == 4
    assert seen[:4] == seen[4:]


def test_a_group_that_is_one_model_samples_the_same_completions(trainer):
    seen = []

    def spy(completions, **kwargs):
        seen.append(tuple(completions))
        return [0.0] * len(completions)

    options = {"sigma": 1e-12, "temperature": 1.0, "num_generations": 3, "max_steps": 2}
    trainer(perturbation="low_rank", reward_funcs=spy, **options).train()
    assert len(set(seen[:4])) == 1 and len(set(seen[4:])) == 1
    assert set(seen[:4]) != set(seen[4:])


def test_a_process_that_leaves_gpus_unused_says_so(config, dataset, reward, caplog):
    logging.getLogger("transformers").propagate = True
    args = config()
    args._n_gpu = 8
    with caplog.at_level("WARNING"):
        ESTrainer(make_model(), reward, args, dataset, processing_class=make_tokenizer())
    assert args.n_gpu == 1
    assert [record.message for record in caplog.records if "one of 8 GPUs" in record.message]


def test_what_is_set_after_the_config_was_made_counts(config, model_folder, dataset, reward, caplog):
    args = config(num_prompts_per_step=2)
    args.num_prompts_per_step = 3
    args.use_transformers_continuous_batching = True  # as an example of TRL does
    with caplog.at_level("WARNING"):
        trainer = ESTrainer(model_folder, reward, args, dataset)
    assert caplog.text.count("use_transformers_continuous_batching=True (members that are evaluated together") == 1
    assert trainer.args is args and not args.use_transformers_continuous_batching
    assert [len(batch) for batch in trainer.get_train_dataloader()] == [3, 3]
    args.temperature = -1.0
    with pytest.raises(ValueError, match="`temperature=-1.0` is not valid"):
        ESTrainer("org/does-not-exist", reward, args, dataset)


def test_a_gaussian_batch_of_one_member_is_written_into_the_weights(trainer, monkeypatch):
    """It needs no copy of the weights, and leaves the members after it alone: the last goes with the center."""
    options = {"evaluate_center": True, "max_steps": 2}
    alone = trainer(make_model(), population_batch_size=1, **options)
    run = trainer(make_model(), population_batch_size=2, **options)
    install, groups = population_batch.PopulationBatch.install, []

    def counted(self, members, sigma):
        groups.append(len(members))
        return install(self, members, sigma)

    monkeypatch.setattr(population_batch.PopulationBatch, "install", counted)
    monkeypatch.setattr(population_batch.PopulationBatch, "fitting", lambda self, rows, tokens, most: (1, rows))
    run.args.population_batch_size = None  # so that what fits counts
    for each in (alone, run):
        each.train()
    assert groups == [2, 2]  # the last member and the center of each step
    assert [log["reward/center"] for log in logs(run)] == [log["reward/center"] for log in logs(alone)]
    assert_same(weights(run.model), weights(alone.model))
