import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from es_trainer import ESTrainer, replay
from es_trainer.cli import main


def run(model_folder, dataset, reward, args) -> ESTrainer:
    trainer = ESTrainer(model_folder, reward, args, train_dataset=dataset)
    trainer.train()
    return trainer


def replayed(*options: str, model: str, history, output) -> dict[str, torch.Tensor]:
    argv = ["--model_name_or_path", model, "--history", str(history), "--output_dir", str(output)]
    assert main(["replay", *argv, *options]) == 0
    assert len(AutoTokenizer.from_pretrained(output)) == 259
    return AutoModelForCausalLM.from_pretrained(output).state_dict()


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name in theirs:
        assert mine[name].dtype == theirs[name].dtype
        assert torch.equal(mine[name], theirs[name])


def test_the_trained_model(model_folder, dataset, reward, config, tmp_path):
    args = config(save_strategy="steps", save_steps=2)
    run(model_folder, dataset, reward, args).save_model(str(tmp_path / "final"))
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    at_two = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2").state_dict()

    history = tmp_path / "run" / "history.jsonl"
    assert_same(replayed(model=model_folder, history=history, output=tmp_path / "a"), final)
    assert_same(replayed("--steps", "2", model=model_folder, history=history.parent, output=tmp_path / "b"), at_two)


def test_a_run_in_another_dtype(model_folder, dataset, reward, config, tmp_path):
    args = config(model_init_kwargs={"dtype": "bfloat16"}, bf16=True)
    run(model_folder, dataset, reward, args).save_model(str(tmp_path / "final"))
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    options = ("--dtype", "bfloat16")
    assert_same(replayed(*options, model=model_folder, history=tmp_path / "run", output=tmp_path / "a"), final)


def test_the_mean_of_the_last_updates_and_updates_of_another_length(model_folder, dataset, reward, config, tmp_path):
    trained = run(model_folder, dataset, reward, config())
    options = ("--average", "last:2", "--scale", "0.5")
    found = replayed(*options, model=model_folder, history=tmp_path / "run", output=tmp_path / "a")
    expected = replay(model_folder, tmp_path / "run", scale=0.5, average=2).state_dict()
    assert_same(found, expected)
    assert not all(torch.equal(found[name], value) for name, value in trained.model.state_dict().items())


def test_an_average_of_something_else(tmp_path, capsys):
    with pytest.raises(SystemExit):
        replayed("--average", "best:2", model=str(tmp_path), history=tmp_path, output=tmp_path / "a")
    assert "`average='best:2'` is not valid: give a number of updates like 'last:10'." in capsys.readouterr().err


def test_more_steps_than_there_are(model_folder, dataset, reward, config, tmp_path, capsys):
    run(model_folder, dataset, reward, config())
    with pytest.raises(SystemExit):
        replayed("--steps", "9", model=model_folder, history=tmp_path / "run", output=tmp_path / "a")
    assert re.search("`steps=9`: the history .* has 3 updates", capsys.readouterr().err)
    assert not (tmp_path / "a").exists()


def test_top_members_are_adapters_of_the_model_before_the_last_update(
    model_folder, dataset, reward, config, tmp_path, capsys
):
    run(model_folder, dataset, reward, config(perturbation="low_rank"))
    source = {"model": model_folder, "history": tmp_path / "run"}
    for steps, before in ((None, "2"), ("2", "1")):
        out = tmp_path / f"steps-{steps}"
        options = ("--steps", steps) if steps else ()
        center = replayed("--top_members", "3", *options, **source, output=out)
        assert_same(center, replayed("--steps", before, **source, output=tmp_path / f"before-{steps}"))
        assert sorted(path.name for path in out.glob("member-*")) == ["member-1", "member-2", "member-3"]
        printed = " ".join(capsys.readouterr().out.split())
        assert f"the best first: {', '.join(str(out / f'member-{i}') for i in (1, 2, 3))}." in printed
        # Each can be named wherever a model can
        member = AutoModelForCausalLM.from_pretrained(out / "member-1")
        assert not torch.equal(member.model.norm.weight, center["model.norm.weight"])
        assert len(AutoTokenizer.from_pretrained(out / "member-1")) == 259


@pytest.mark.parametrize("other", [("--scale", "2"), ("--average", "last:2")])
def test_top_members_of_other_weights(other, tmp_path, capsys):
    with pytest.raises(SystemExit):
        replayed("--top_members", "1", *other, model=str(tmp_path), history=tmp_path, output=tmp_path / "a")
    assert "`top_members=1` is given together with `scale` or `average`" in capsys.readouterr().err


def test_top_members_of_full_rank_noise(model_folder, dataset, reward, config, tmp_path, capsys):
    run(model_folder, dataset, reward, config())
    with pytest.raises(SystemExit):
        replayed("--top_members", "1", model=model_folder, history=tmp_path / "run", output=tmp_path / "a")
    assert "only the members of low-rank noise are LoRA adapters" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
