"""Training with vLLM in the trainer's process."""

import pytest
import tiny
import torch
from conftest import assert_same, letters, logs, make_model, make_tokenizer, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from watched import compute_with_a_copy

from es_trainer import ESConfig, ESTrainer, replay
from es_trainer.engines.vllm_weights import LoadError
from es_trainer.evolution import Member
from es_trainer.smollm2 import smollm2
from es_trainer.tasks import conciseness


@pytest.fixture
def start(trainer):
    """Make an ESTrainer for a tiny run, with vLLM or without."""

    def make(use_vllm=True, **options) -> ESTrainer:
        return trainer(**{"model": tiny.tiny_folder(), "use_vllm": use_vllm, **options})

    return make


def assert_alike(mine: ESTrainer, theirs: ESTrainer) -> None:
    """Rewards, weights and what is logged of them."""
    for one, other in zip(logs(mine), logs(theirs), strict=True):
        for key in ("reward", "reward_std", "update_norm", "distance_from_start", "completions/mean_length"):
            assert one[key] == other[key], key
    assert_same(weights(mine.model), weights(theirs.model))


def test_three_steps_are_those_of_transformers(start, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "auto_step": 1, "auto_step_prompts": 4}
    mine, theirs = start(**options), start(False, **options)
    before = weights(theirs.model)
    mine.train()
    theirs.train()
    assert_alike(mine, theirs)
    assert len({log["reward"] for log in logs(mine)}) == 3
    for key in ("step_scale", "auto_step/reward", "auto_step/gain", "auto_step/half", "auto_step/double"):
        assert [log.get(key) for log in logs(mine)] == [log.get(key) for log in logs(theirs)], key
    assert any(log["auto_step/double"] for log in logs(mine))
    evaluations = [[log for log in t.state.log_history if "eval_reward" in log][-1] for t in (mine, theirs)]
    assert evaluations[0]["eval_reward"] == evaluations[1]["eval_reward"]
    mine.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_same(weights(saved), weights(theirs.model))
    assert not torch.equal(before["model.norm.weight"], weights(saved)["model.norm.weight"])
    replayed = replay(tiny.tiny_folder(), mine.args.output_dir)
    assert_same(weights(replayed), weights(saved))


@pytest.mark.parametrize("options", [{}, {"perturbation": "low_rank", "vllm_lora": True, "population_batch_size": 3}])
def test_pairs_answer_prompts_of_their_own(start, dataset, options):
    asked = []

    def reward(prompts, completions, **kwargs):
        asked.append((prompts, completions))
        return letters(completions)

    options = {**options, "unique_prompts": True, "antithetic": True, "max_steps": 2}
    options |= {"reward_funcs": reward, "shuffle_dataset": False, "population_size": 6, "num_prompts_per_step": 1}
    mine = start(**options)
    mine.train()
    there = asked.copy()
    asked.clear()
    # The same weights are perturbed
    frozen = {name for name, parameter in mine.model.named_parameters() if not parameter.requires_grad}
    model = AutoModelForCausalLM.from_pretrained(tiny.tiny_folder())
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name not in frozen
    theirs = start(False, model=model, **{name: value for name, value in options.items() if name != "vllm_lora"})
    theirs.train()
    assert [prompt for (prompt,), _ in there[:6]] == [prompt for prompt in dataset["prompt"][:3] for _ in range(2)]
    assert there == asked
    for key in ("reward", "reward_std", "num_tokens"):
        assert [log[key] for log in logs(mine)] == [log[key] for log in logs(theirs)], key


def test_bfloat16_weights_are_the_masters_rounded(start, tmp_path):
    # Tokens flip with the rounding of other kernels: a reward that does not hang on them
    def reward(prompts, trainer_state, **kwargs):
        return [float(trainer_state.global_step)] * len(prompts)

    mine = start(bf16=True, reward_funcs=reward, fitness_shaping="none")
    theirs = start(False, bf16=True, reward_funcs=reward, fitness_shaping="none")
    mine.train()
    theirs.train()
    assert_alike(mine, theirs)
    assert {shard.working.dtype for shard in mine.optimizer.weights.shards} == {torch.bfloat16}
    assert {parameter.dtype for parameter in mine.model.parameters()} == {torch.float32}
    mine.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    for shard in mine.optimizer.weights.shards:
        assert torch.equal(saved[shard.name].flatten(), shard.master)


def test_the_engine_has_the_only_working_weights(start):
    trainer = start()
    (engine_weights,) = trainer.engine.llm.collective_rpc(
        "engine_weights", args=({name: parameter.shape for name, parameter in trainer.model.named_parameters()},)
    )
    for name, parameter in trainer.model.named_parameters():
        assert parameter.data_ptr() == engine_weights[name].weights.data_ptr()


def test_a_population_leaves_the_weights_bit_identical(start):
    trainer = start(sigma=0.3)
    before = weights(trainer.model)
    trainer.training_step(trainer.model, [trainer.train_dataset[i] for i in range(2)])
    assert_same(weights(trainer.model), before)


def test_nothing_computed_with_other_weights_is_read(start, monkeypatch):
    prompt = [[{"role": "user", "content": "Say one " * 25}]]  # more than the 128 tokens that vLLM caches together
    trainer = start(sigma=0.3)
    ids = trainer.engine.tokenize(prompt)
    monkeypatch.setattr(trainer.engine.llm, "reset_prefix_cache", lambda *_: False)  # as vLLM may
    theirs = start(False, sigma=0.3)
    for seed in (1, 2, 2, 1):
        answers = []
        for each in (trainer, theirs):
            each.optimizer.perturb(Member(seed, 1))
            answers.append(each.engine.generate(ids, seed=0)[0].ids)
        assert answers[0] == answers[1]


def test_a_prefix_cache_that_is_not_emptied_is_an_error(start):
    def rollout(prompts, trainer):
        ids = trainer.processing_class(text=prompts)["input_ids"]
        trainer.engine.llm.enqueue([{"prompt_token_ids": i} for i in ids], use_tqdm=False)
        trainer.engine.llm.llm_engine.step()  # and the requests stay under way
        return {"prompt_ids": ids, "completion_ids": [[5] for _ in ids]}

    with pytest.raises(RuntimeError, match="vLLM did not empty its prefix cache, because .* have not ended"):
        start(rollout_func=rollout, max_steps=1).train()


def test_an_object_with_frozen_parameters(start, tmp_path):
    def model():
        made = make_model(seed=3, **tiny.HEADS)
        made.model.embed_tokens.weight.requires_grad = False
        return made

    mine, theirs = start(model=model()), start(False, model=model())
    mine.train()
    theirs.train()
    for trainer, folder in ((mine, "mine"), (theirs, "theirs")):
        trainer.save_model(str(tmp_path / folder))
    saved = [load_file(tmp_path / folder / "model.safetensors") for folder in ("mine", "theirs")]
    assert_same(*saved)
    assert torch.equal(saved[0]["model.embed_tokens.weight"], weights(model())["model.embed_tokens.weight"])


def test_resumed_runs_end_with_the_same_weights(start, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "es_optimizer": "adam"}
    whole = start(**options)
    whole.train()
    resumed = start(**options, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert_same(weights(resumed.model), weights(whole.model))
    assert [log["reward"] for log in logs(resumed)] == [log["reward"] for log in logs(whole)]


def test_sampling_has_random_numbers_common_to_members(start):
    trainer = start(temperature=1.5, num_generations=2, sigma=1e-9)
    rows = [trainer.train_dataset[i] for i in range(2)]
    ids = trainer.engine.tokenize([row["prompt"] for row in rows])
    answers = {}
    for seed in (1, 1, 2):
        for member in (None, Member(5, 1)):
            if member is not None:
                trainer.optimizer.perturb(member)
            answers.setdefault(seed, []).append([c.ids for c in trainer.engine.generate(ids, seed, 2)])
            trainer.optimizer.restore()
    assert len({str(answer) for answer in answers[1]}) == 1
    assert answers[2][0] != answers[1][0]
    assert len({str(ids) for ids in answers[1][0]}) == 4  # prompts and their completions differ


def test_stop_strings_and_regular_expressions(start):
    trainer = start(max_completion_length=12)
    ids = trainer.engine.tokenize(list(trainer.train_dataset["prompt"]))
    plain = trainer.engine.generate(ids, 0)
    stop = plain[0].text[3]
    stopped = start(max_completion_length=12, generation_kwargs={"stop_strings": [stop]})
    theirs = start(False, max_completion_length=12, generation_kwargs={"stop_strings": [stop]})
    mine = stopped.engine.generate(ids, 0)
    assert mine == theirs.engine.generate(ids, 0) != plain
    # The same characters as plain, of one token each: the stop string ends with the last token there may be
    at_the_limit = start(max_completion_length=4, generation_kwargs={"stop_strings": [stop]}).engine.generate(ids, 0)
    assert [c.ids for c in at_the_limit] == [c.ids[:4] for c in mine]
    assert [c.truncated for c in at_the_limit] == [stop not in plain[i].text[:4] for i in range(len(ids))]
    assert not at_the_limit[0].truncated
    digits = start(max_completion_length=4, vllm_structured_outputs_regex="[0-9]{3}")
    assert all(c.text.isdigit() and len(c.text) == 3 for c in digits.engine.generate(ids, 0))


def test_low_rank_members_in_place(start):
    mine = start(perturbation="low_rank")
    theirs = start(False, perturbation="low_rank", population_batch_size=1)
    mine.train()
    theirs.train()
    assert_alike(mine, theirs)


@pytest.mark.parametrize("rank", [1, 2])
def test_members_as_adapters(start, caplog, rank):
    mine = start(perturbation="low_rank", perturbation_rank=rank, vllm_lora=True, population_batch_size=3)
    assert "6 parameters" in caplog.text and "embed_tokens.weight, model.layers.*.input_layernorm.w" in caplog.text
    model = make_model(**tiny.HEADS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "proj" in name
    theirs = start(False, model=model, perturbation="low_rank", perturbation_rank=rank)
    mine.train()
    theirs.train()
    assert_alike(mine, theirs)
    assert len({log["reward_std"] for log in logs(mine)}) == 3


def test_a_rollout_function_generates_with_the_engine(start):
    from vllm import SamplingParams

    texts = []

    def rollout(prompts, trainer):
        ids = trainer.processing_class(text=prompts)["input_ids"]
        params = SamplingParams(temperature=0.0, max_tokens=8)
        outputs = trainer.engine.llm.generate([{"prompt_token_ids": i} for i in ids], params, use_tqdm=False)
        texts.append([output.outputs[0].text for output in outputs])
        return {"prompt_ids": ids, "completion_ids": [list(output.outputs[0].token_ids) for output in outputs]}

    trainer = start(rollout_func=rollout, max_steps=1, sigma=0.3)
    trainer.train()
    assert len({str(text) for text in texts}) == trainer.args.population_size


def test_prompts_longer_than_the_engine_takes(start):
    with pytest.raises(ValueError, match="context of 16 tokens"):
        start(vllm_max_model_length=16, max_completion_length=12)


def test_weights_of_another_model_are_found_out(tmp_path, start):
    trainer = start()
    trainer.model.model.norm.weight.data = trainer.model.model.norm.weight.data + 1
    with pytest.raises(LoadError, match="model.norm.weight has other values"):
        trainer.engine.engine_weights()


@pytest.mark.parametrize(
    ("broken", "when"),
    [
        ("prefill and decoding", lambda x: True),
        ("prefill", lambda x: len(x) > 1),
        ("decoding", lambda x: len(x) == 1),
    ],
)
def test_weights_that_are_not_computed_with(start, broken, when):
    trainer = start()
    before = weights(trainer.model)
    trainer.engine.llm.apply_model(
        lambda model: compute_with_a_copy(model.get_submodule("model.layers.0.self_attn.qkv_proj"), when)
    )
    problem = f"a change of model.layers.0.self_attn.{{}}_proj.weight has no effect on {broken}"
    with pytest.raises(LoadError, match="; ".join(problem.format(part) for part in "qkv") + "[.]"):
        trainer.engine.engine_weights()
    assert_same(weights(trainer.model), before)


def test_progress_of_a_member_is_shown(start, capfd):
    trainer = start(disable_tqdm=False, max_steps=1)
    trainer.train()
    shown = capfd.readouterr().err
    assert "Members" in shown and "Processed prompts" in shown


def test_the_tokenizer_is_the_given_one(start):
    assert start().engine.llm.get_tokenizer().get_vocab() == make_tokenizer().get_vocab()


def make_real(folder, **options) -> ESTrainer:
    """Make an ESTrainer for a run of the quickstart's task."""
    task = conciseness()
    args = ESConfig(
        str(folder),
        use_cpu=True,
        sigma=0.01,
        learning_rate=0.02,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        vllm_max_model_length=256,
        **options,
    )
    return ESTrainer(smollm2(), task.reward_funcs, args, task.train_dataset, task.eval_dataset)


def test_quickstart_task_with_a_real_model(tmp_path):
    options = {
        "bf16": False,
        "population_size": 4,
        "num_prompts_per_step": 3,
        "max_completion_length": 12,
        "max_steps": 2,
    }
    runs = {use: make_real(tmp_path / str(use), use_vllm=use, **options) for use in (True, False)}
    for run in runs.values():
        run.train()
    assert_alike(runs[True], runs[False])
    assert len({log["reward_std"] for log in logs(runs[True])} - {0.0}) == 2


@pytest.mark.slow
def test_quickstart_learns_with_adapters(tmp_path):
    trainer = make_real(
        tmp_path,
        use_vllm=True,
        vllm_lora=True,
        population_size=32,
        perturbation="low_rank",
        lr_scheduler_type="constant",
        num_prompts_per_step=8,
        max_completion_length=16,
        max_steps=8,
        per_device_eval_batch_size=16,
    )
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    assert after > before / 2  # rewards are negative
