"""The history of a run: what is in it, what is kept of it, and what can be done with it."""

import json
import shutil

import pytest
import torch
from conftest import assert_same, letters, logs, make_model, weights
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from es_trainer import replay
from es_trainer.noise import noise
from es_trainer.report.plots import read_run
from es_trainer.run.history_file import History


def read(folder) -> tuple[dict, list[dict]]:
    header, *lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return header, lines


def updates(folder) -> list[dict]:
    return [{key: line[key] for key in ("step", "seeds", "utilities", "rewards")} for line in read(folder)[1]]


# ---- what is in it ----


def test_lines_have_the_rewards_of_members(trainer, tmp_path):
    run = trainer()
    run.train()
    for line, log in zip(read(tmp_path / "run")[1], logs(run), strict=True):
        assert len(line["rewards"]) == 4
        assert sum(line["rewards"]) / 4 == pytest.approx(log["reward"])


def test_noise_of_another_version_is_refused(trainer, model_folder, tmp_path, monkeypatch):
    trainer(save_strategy="steps", save_steps=1).train()
    assert read(tmp_path / "run")[0]["noise_version"] == noise.VERSION == 1
    monkeypatch.setattr(noise, "VERSION", 2)
    with pytest.raises(ValueError, match="its noise has version 1, but this version of es_trainer makes noise of ver"):
        replay(model_folder, tmp_path / "run")
    with pytest.raises(ValueError, match="its noise has version 1"):
        trainer(save_strategy="steps", max_steps=4).train(resume_from_checkpoint=True)


def test_a_replay_on_another_kind_of_device_says_so(trainer, model_folder, tmp_path, caplog):
    trainer().train()
    header, lines = read(tmp_path / "run")
    assert header["device"] == "cpu"
    with caplog.at_level("WARNING"):
        replay(model_folder, tmp_path / "run")
        assert "is replayed on" not in caplog.text
        History(tmp_path / "run" / "history.jsonl").write({**header, "device": "cuda"}, lines)
        replay(make_model(), tmp_path / "run")
    assert "The run was on 'cuda' and is replayed on 'cpu'" in caplog.text


def test_a_history_without_a_version_is_of_the_first(trainer, model_folder, tmp_path):
    run = trainer()
    run.train()
    header, lines = read(tmp_path / "run")
    for key in ("noise_version", "start", "device"):
        del header[key]
    History(tmp_path / "run" / "history.jsonl").write(header, lines)
    assert_same(weights(replay(model_folder, tmp_path / "run")), weights(run.model))


def test_other_initial_weights_are_refused(trainer, tmp_path):
    trainer(make_model(0)).train()
    replay(make_model(0), tmp_path / "run")
    with pytest.raises(ValueError, match="started with other weights than the base model has"):
        replay(make_model(1), tmp_path / "run")


# ---- two counters: of updates and of the steps of a call of train() ----


def test_training_twice_and_resuming_logs_what_one_run_would(trainer, tmp_path):
    def metrics(run) -> list[dict]:
        clock = ("seconds", "step_time", "per_second", "runtime")
        return [{k: v for k, v in log.items() if not k.endswith(clock)} for log in logs(run)]

    options = {"logging_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(**options)
    whole.train()
    whole.train()
    resumed = trainer(output_dir=str(tmp_path / "other"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert metrics(resumed) == metrics(whole)
    assert_same(weights(resumed.model), weights(whole.model))
    assert [(line["step"], line["global_step"]) for line in read(tmp_path / "run")[1]] == [
        (update, (update - 1) % 4 + 1) for update in range(1, 9)
    ]


def test_a_plot_of_training_twice_has_evaluations_at_their_updates(trainer, tmp_path):
    run = trainer(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, max_steps=2)
    run.train()
    run.train()
    found = read_run(tmp_path / "run")
    assert [log["step"] for log in found if "reward" in log] == [1, 2, 3, 4]
    assert [log["step"] for log in found if "eval_reward" in log] == [4]


# ---- what is kept of it ----


def test_an_earlier_history_is_kept(trainer, tmp_path):
    trainer().train()
    before = (tmp_path / "run" / "history.jsonl").read_text()
    trainer(seed=1).train()
    trainer(seed=2).train()
    assert (tmp_path / "run" / "history-1.jsonl").read_text() == before
    assert read(tmp_path / "run")[0]["config"]["seed"] == 2
    assert len(list((tmp_path / "run").glob("history*.jsonl"))) == 3


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 6,
    "learning_rate": 1.0,  # so large that it does not get better all the time
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_reward",
}


@pytest.mark.parametrize("options", [{"es_optimizer": "adam", "learning_rate": 0.3}, {"bf16": True}])
def test_training_after_the_best_model_was_loaded_goes_on_from_its_update(trainer, model_folder, tmp_path, options):
    run = trainer(**{**BEST, **options})
    run.train()
    best = run.state.best_global_step
    assert best < 6
    whole = (tmp_path / "run" / "history.jsonl").read_text()
    assert_same(weights(replay(model_folder, tmp_path / "run", best)), weights(run.model))
    run.args.load_best_model_at_end = False
    run.train()
    lines = read(tmp_path / "run")[1]
    assert [line["step"] for line in lines] == list(range(1, best + 6 + 1))
    assert_same(weights(replay(model_folder, tmp_path / "run")), weights(run.model))
    assert (tmp_path / "run" / "history-1.jsonl").read_text() == whole


def test_the_best_model_of_a_folder_that_was_moved(trainer, tmp_path):
    first = trainer(**BEST)
    first.train()
    best = first.state.best_global_step
    assert best < 6
    shutil.move(tmp_path / "run", tmp_path / "moved")
    again = trainer(**BEST, output_dir=str(tmp_path / "moved"))
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "moved" / f"checkpoint-{best}")
    assert_same(weights(again.model), weights(first.model))


def test_training_after_the_best_model_without_its_state_is_a_run_of_its_own(trainer, tmp_path):
    run = trainer(**BEST, bf16=True, save_only_model=True)
    run.train()
    shutil.copytree(run.state.best_model_checkpoint, tmp_path / "best")
    run.args.load_best_model_at_end = False
    run.train()
    assert len(read(tmp_path / "run")[1]) == 6
    assert_same(weights(replay(str(tmp_path / "best"), tmp_path / "run")), weights(run.model))


def test_a_run_that_fails_before_its_first_update_leaves_an_earlier_history(trainer, tmp_path):
    trainer().train()
    before = (tmp_path / "run" / "history.jsonl").read_text()

    def fails(completions, **kwargs):
        raise KeyError("answer")

    with pytest.raises(RuntimeError, match="KeyError"):
        trainer(reward_funcs=fails).train()
    with pytest.raises(ValueError, match="No valid checkpoint .* is of another run: `seed` is 1 but was 42"):
        trainer(seed=1).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="No valid checkpoint .* is of another run: it started with other weights"):
        trainer(make_model(1)).train(resume_from_checkpoint=True)
    assert (tmp_path / "run" / "history.jsonl").read_text() == before


def test_resuming_keeps_updates_after_the_checkpoint(trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer(**options).train()
    before = (tmp_path / "run" / "history.jsonl").read_text()

    def other(completions, **kwargs):
        return [float(text.count("a")) - i for i, text in enumerate(completions)]

    trainer(reward_funcs=other, **options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert (tmp_path / "run" / "history-1.jsonl").read_text() == before
    assert len(read(tmp_path / "run")[1]) == 3


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_torn_last_line_is_left_out(trainer, model_folder, tmp_path, cut):
    run = trainer(save_strategy="steps", save_steps=2)
    run.train()
    path = tmp_path / "run" / "history.jsonl"
    *complete, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join(complete) + last.rstrip("\n")[:cut])
    rebuilt = replay(model_folder, tmp_path / "run")
    assert_same(weights(rebuilt), weights(replay(model_folder, tmp_path / "run" / "checkpoint-2")))
    assert [log["step"] for log in read_run(tmp_path / "run") if "reward" in log] == [1, 2]
    trainer().train(resume_from_checkpoint=True)
    assert len(read(tmp_path / "run")[1]) == 3


@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_line_is_named(trainer, model_folder, tmp_path, number):
    trainer().train()
    path = tmp_path / "run" / "history.jsonl"
    lines = path.read_text().splitlines()
    lines[number - 1] = lines[number - 1][:9]
    path.write_text("\n".join(lines) + "\n")
    for read_it in (lambda: replay(model_folder, path), lambda: read_run(path.parent)):
        with pytest.raises(ValueError, match=f"Line {number} of .*history.jsonl is not JSON"):
            read_it()


# ---- going on from it ----


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True, "es_optimizer": "adam", "lr_scheduler_type": "linear"},
        {"bf16": True, "master_weights": "none"},
        {"perturbation": "low_rank", "temperature": 1.0, "num_generations": 2},
    ],
)
def test_an_interrupted_run_goes_on_from_its_last_update(trainer, tmp_path, options):
    options = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 1,
        **options,
    }
    whole = trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    seen = []

    def interrupted(completions, prompts, trainer_state, **kwargs):
        if trainer_state.global_step == 5:
            raise KeyboardInterrupt
        return letters(completions)

    def noted(completions, prompts, trainer_state, **kwargs):
        seen.append(trainer_state.global_step)
        return letters(completions)

    for function in (interrupted, noted):
        function.__name__ = "letters"
    with pytest.raises(KeyboardInterrupt):
        trainer(reward_funcs=interrupted, eval_dataset=None, **{**options, "eval_strategy": "no"}).train()
    assert len(read(tmp_path / "run")[1]) == 5
    again = trainer(reward_funcs=noted, eval_dataset=None, **{**options, "eval_strategy": "no"})
    again.train(resume_from_checkpoint=True)
    assert set(seen) == {5, 6}  # the update after the checkpoint, of step 4, was done again without rewards
    assert_same(weights(again.model), weights(whole.model))
    assert updates(tmp_path / "run") == updates(tmp_path / "whole")
    assert len(read(tmp_path / "run" / "checkpoint-6")[1]) == 6
    assert [log["reward"] for log in logs(again)] == [log["reward"] for log in logs(whole)]


@pytest.mark.parametrize("options", [{"bf16": True, "es_optimizer": "adam"}, {"peft_config": True}])
def test_a_run_without_a_checkpoint_goes_on_from_its_history(trainer, tmp_path, options):
    options = {"max_steps": 4, **options}
    if "peft_config" in options:
        options["peft_config"] = adapter()
    whole = trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    seen = []

    def interrupted(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 2:
            raise KeyboardInterrupt
        return letters(completions)

    def noted(completions, trainer_state, **kwargs):
        seen.append(trainer_state.global_step)
        return letters(completions)

    for function in (interrupted, noted):
        function.__name__ = "letters"
    with pytest.raises(KeyboardInterrupt):
        trainer(reward_funcs=interrupted, **options).train()
    again = trainer(reward_funcs=noted, **options)
    again.train(resume_from_checkpoint=True)
    assert set(seen) == {2, 3}
    assert_same(weights(again.model), weights(whole.model))
    assert updates(tmp_path / "run") == updates(tmp_path / "whole")
    assert [log["reward"] for log in logs(again)] == [log["reward"] for log in logs(whole)]
    assert not list((tmp_path / "run").glob("history-*"))


def test_updates_that_left_other_rounding_errors_are_evaluated_anew(trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "master_weights": "none", "bf16": True}
    trainer(max_steps=3, population_batch_size=1, **options).train()
    before = (tmp_path / "run" / "history.jsonl").read_text()
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    trainer(max_steps=4, population_batch_size=2, **options).train(resume_from_checkpoint=True)
    lines = read(tmp_path / "run")[1]
    assert [(line["step"], line["in_place"]) for line in lines] == [(1, True), (2, True), (3, False), (4, False)]
    assert (tmp_path / "run" / "history-1.jsonl").read_text() == before


@pytest.mark.parametrize("max_steps", [2, 1])
def test_a_finished_run_that_is_started_again_stays_as_it_is(trainer, tmp_path, max_steps):
    options = {"save_strategy": "steps", "save_steps": 1}
    first = trainer(max_steps=2, **options)
    first.train()
    before = updates(tmp_path / "run")
    again = trainer(max_steps=max_steps, **options)
    assert again.train(resume_from_checkpoint=True).global_step == 2
    assert_same(weights(again.model), weights(first.model))
    assert updates(tmp_path / "run") == before
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(("steps", "longer"), [(4, 4), (3, 3), (4, 9), (6, 9), (3, 9)])
def test_a_stream_that_began_again_goes_on_where_it_was(trainer, tmp_path, steps, longer):
    seen = []

    def noted(completions, prompts, trainer_state, **kwargs):
        seen.append((trainer_state.global_step, tuple(prompts)))
        return letters(completions)

    rows = [{"prompt": f"Say {word}"} for word in "one two three four five six".split()]  # three steps
    options = {"reward_funcs": noted, "shuffle_dataset": False, "save_strategy": "steps", "save_steps": steps}
    options["train_dataset"] = Dataset.from_list(rows).to_iterable_dataset()
    whole = trainer(max_steps=max(7, longer), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    expected = {step: prompts for step, prompts in seen if step >= steps}
    trainer(max_steps=max(steps, longer - 2), **options).train()
    seen.clear()
    again = trainer(max_steps=max(7, longer), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{steps}"))
    assert dict(seen) == expected
    assert_same(weights(again.model), weights(whole.model))


# ---- adapters ----


def adapter() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("given", ["name", "model"])
def test_an_adapter_that_the_trainer_made_is_made_again(trainer, model_folder, tmp_path, given):
    base = model_folder if given == "name" else AutoModelForCausalLM.from_pretrained(model_folder)
    run = trainer(base, peft_config=adapter(), bf16=True)
    run.train()
    torch.manual_seed(5)
    assert_same(weights(replay(model_folder, tmp_path / "run")), weights(run.model))


def test_an_adapter_that_was_given_is_given_again(trainer, model_folder, tmp_path):
    def model(seed: int = 0):
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        torch.manual_seed(seed)
        return get_peft_model(base, adapter())

    run = trainer(model())
    run.train()
    assert_same(weights(replay(model(), tmp_path / "run")), weights(run.model))
    with pytest.raises(ValueError, match="is of an adapter.* Give the `PeftModel` that the run started with"):
        replay(model_folder, tmp_path / "run")
    with pytest.raises(ValueError, match="started with other weights"):
        replay(model(1), tmp_path / "run")


@pytest.mark.parametrize("options", [{}, {"bf16": True, "master_weights": "none"}])
def test_the_mean_of_the_weights_after_the_last_updates(trainer, options):
    after = []
    run = trainer(make_model(), max_steps=4, **options)
    hook = run.optimizer.register_step_post_hook(
        lambda *_: after.append({shard.name: shard.trained.clone() for shard in run.optimizer.weights.shards})
    )
    run.train()
    hook.remove()
    folder = run.args.output_dir
    found = weights(replay(make_model(), folder, average=3))
    for name, value in found.items():
        expected = torch.stack([of_step[name].float() for of_step in after[1:]]).mean(dim=0)
        assert torch.allclose(value.flatten().float(), expected, atol=1e-6, rtol=1e-2 if options else 1e-6)
    assert_same(
        weights(replay(make_model(), folder, steps=2, average=1)), weights(replay(make_model(), folder, steps=2))
    )


def test_updates_of_another_length(trainer):
    run = trainer(make_model(), max_steps=1)
    run.train()
    start, once = weights(make_model()), weights(run.model)
    for name, value in weights(replay(make_model(), run.args.output_dir, scale=3.0)).items():
        assert torch.allclose(value - start[name], 3 * (once[name] - start[name]), atol=1e-6)


@pytest.mark.parametrize("average", [0, 3])
def test_no_more_updates_are_averaged_than_there_are(trainer, average):
    run = trainer(make_model(), max_steps=2)
    run.train()
    with pytest.raises(ValueError, match=f"`average={average}` is not valid: 2 updates are replayed"):
        replay(make_model(), run.args.output_dir, average=average)
