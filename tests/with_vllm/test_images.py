"""Training with images and vLLM in the trainer's process."""

import pytest
import tiny
import torch
from conftest import assert_same, logs, weights
from looking import ENDS, MOST, call_always, look, make_looking
from peft import LoraConfig
from tiny_pictures import FAMILY, answers, folder, make
from tiny_vision import picture, question, with_pictures
from transformers import AutoModelForImageTextToText
from watched import compute_with_a_copy

from es_trainer import ESTrainer, replay
from es_trainer.engines.vllm_weights import LoadError
from es_trainer.evolution import Member


@pytest.fixture
def see(trainer):
    """Make an ESTrainer that trains a tiny model on pictures, with vLLM or without."""

    def start(use_vllm=True, **options) -> ESTrainer:
        data = options.pop("dataset", with_pictures())
        given = {"train_dataset": data, "eval_dataset": data, "processing_class": None, "population_batch_size": 1}
        return trainer(options.pop("model", folder()), use_vllm=use_vllm, **{**given, **options})

    return start


def is_of_vision(name: str) -> bool:
    return "vision" in name or "connector" in name


def test_three_steps_are_those_of_transformers(see, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3}
    mine, theirs = see(**options), see(False, **options)
    before = weights(theirs.model)
    trained = [{name for name, p in run.model.named_parameters() if p.requires_grad} for run in (mine, theirs)]
    assert trained[0] == trained[1] and any(map(is_of_vision, trained[0]))
    for run in (mine, theirs):
        run.train()
    for one, other in zip(logs(mine), logs(theirs), strict=True):
        for key in ("reward", "reward_std", "update_norm", "completions/mean_length", "num_tokens"):
            assert one[key] == other[key], key
    assert len({log["reward"] for log in logs(mine)}) == 3
    assert_same(weights(mine.model), weights(theirs.model))
    evaluations = [[log for log in t.state.log_history if "eval_reward" in log][-1] for t in (mine, theirs)]
    assert evaluations[0]["eval_reward"] == evaluations[1]["eval_reward"]
    mine.save_model(str(tmp_path / "saved"))
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_same(weights(saved), weights(theirs.model))
    assert all(not torch.equal(before[name], value) for name, value in weights(saved).items() if name in trained[0])
    assert_same(weights(replay(folder(), mine.args.output_dir)), weights(saved))


def test_rows_with_one_image_with_several_and_without(see):
    images = [[picture(0)], [], None, [picture(1), picture(2, width=64)], [picture(0), picture(0)]]
    rows = [{"prompt": question(f"What is {i}?"), "images": some} for i, some in enumerate(images)]
    mine, theirs = see(), see(False)
    expected = answers(theirs, rows)
    assert len(set(map(tuple, expected))) == len(rows)
    assert answers(mine, rows) == expected
    assert answers(mine, rows[::-1]) == expected[::-1]


def test_nothing_that_another_member_has_seen_is_read(see):
    """The vision tower alone differs between members, and all of them are shown the same images."""
    rows, runs = list(with_pictures(2)), []
    for use_vllm in (True, False):
        model, processor = make()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = is_of_vision(name)
        runs.append(see(use_vllm, model=model, processing_class=processor, sigma=0.5))
    seen = []
    for seed in (1, 2, 2, 1):
        of_runs = []
        for run in runs:
            run.optimizer.perturb(Member(seed, 1))
            of_runs.append(answers(run, rows))
        assert of_runs[0] == of_runs[1]
        seen.append(of_runs[0])
    assert seen[0] == seen[3] != seen[1] == seen[2]


def test_adapters_of_peft_are_refused(see):
    with pytest.raises(ValueError, match="`train_dataset` has the column 'image', but vLLM is not given images with"):
        see(model="no/such-model", peft_config=LoraConfig(target_modules=["q_proj"]), population_batch_size=2)


def test_weights_of_the_vision_tower_that_are_not_computed_with(see):
    run = see()
    before = weights(run.model)
    layer = "model.vision_model.encoder.layers.0.mlp.fc1"
    run.engine.llm.apply_model(lambda model: compute_with_a_copy(model.get_submodule(layer)))
    with pytest.raises(LoadError, match=f"a change of {layer}.weight has no effect on prompts with images[.]"):
        run.engine.engine_weights(run.backend.answers.image_prompt)
    assert_same(weights(run.model), before)


def test_the_processor_is_the_given_one(see):
    _, processor = make()
    processor.image_processor.size = {"longest_edge": 32}
    rows = list(with_pictures())
    runs = see(processing_class=processor), see(False, processing_class=processor), see(False)
    mine, theirs, usual = (answers(run, rows) for run in runs)
    assert mine == theirs != usual


def test_a_processor_that_makes_other_tokens_is_an_error(see):
    run = see()
    run.engine.images.processor.image_processor.size = {"longest_edge": 32}
    with pytest.raises(ValueError, match=r"vLLM makes other tokens of a prompt with images \(\d+\) than the pro"):
        answers(run, list(with_pictures(1)))


def test_members_as_adapters(see, caplog):
    options = {"perturbation": "low_rank", "sigma": 0.2}
    mine = see(vllm_lora=True, population_batch_size=3, **options)
    frozen = {name for name, p in mine.model.named_parameters() if not p.requires_grad}
    assert "parameters that adapters cannot carry stay as they are" in caplog.text
    model, processor = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name not in frozen
        assert parameter.requires_grad == ("text_model" in name and "proj" in name)
    theirs = see(False, model=model, processing_class=processor, **options)
    for run in (mine, theirs):
        run.train()
    for one, other in zip(logs(mine), logs(theirs), strict=True):
        for key in ("reward", "reward_std", "update_norm", "num_tokens"):
            assert one[key] == other[key], key
    assert len({log["reward_std"] for log in logs(mine)} - {0.0}) == 3
    assert_same(weights(mine.model), weights(theirs.model))


def test_tools_return_images(see, monkeypatch):
    """All turns are those of Transformers' engine: each sees the images of the turns before."""
    call_always(monkeypatch)
    found = []

    def reward(completions, completion_ids, **kwargs):
        found[-1] += completion_ids
        return [float(sum(ids)) for ids in completion_ids]

    for use_vllm in (True, False):
        found.append([])
        model, processor = make_looking(FAMILY, **tiny.HEADS)
        options = {"model": model, "processing_class": processor, "tools": [look], "max_tool_calling_iterations": 2}
        ends = "stop_token_ids" if use_vllm else "eos_token_id"
        run = see(
            use_vllm,
            **options,
            reward_funcs=reward,
            max_steps=2,
            max_completion_length=MOST,
            generation_kwargs={ends: ENDS},
            shuffle_dataset=False,
        )
        run.train()
    assert sorted(found[0]) == sorted(found[1])
    assert len(found[0]) == 2 * 4 * 2 and len(set(map(tuple, found[0]))) > 2
