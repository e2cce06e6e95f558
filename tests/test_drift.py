"""Drift from the start: KL divergence of next-token distributions on held-out prompts, `eval_kl`."""

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from scipy.special import log_softmax
from transformers import AutoModelForCausalLM

from es_trainer.backends import TrainerInputs
from es_trainer.backends.drift import LAST_TOKENS, kl_divergence
from es_trainer.backends.zero3 import Lockstep
from es_trainer.cli.plot import main as plot


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
LONG = "ab" * LAST_TOKENS  # more tokens than are compared, one a byte


def by_hand(start, now, prompts: list[str]) -> float:
    """The mean of sum(p * log(p / q)) over the last tokens of all prompts."""
    values = []
    for prompt in prompts:
        ids = torch.tensor([make_tokenizer()(prompt)["input_ids"]])
        with torch.no_grad():
            p, q = (log_softmax(model(ids).logits[0].double().numpy(), axis=1) for model in (start, now))
        values += list((np.exp(p) * (p - q)).sum(axis=1))[-64:]
    return float(np.mean(values))


def column(run, key: str) -> list[float]:
    return [log[key] for log in run.state.log_history if key in log]


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_list([{"prompt": prompt} for prompt in (LONG, "Say one", "Say two", "Say three")])


def test_it_is_the_divergence_of_the_trained_model_from_the_start(trainer, model_folder, rows, tmp_path):
    run = trainer(eval_dataset=rows, eval_kl_prompts=3, **EVALUATED)
    run.train()
    run.save_model(str(tmp_path / "trained"))
    start, now = (AutoModelForCausalLM.from_pretrained(path) for path in (model_folder, tmp_path / "trained"))
    expected = by_hand(start, now, rows["prompt"][:3])
    assert expected > 1e-3 and len({by_hand(start, now, rows["prompt"][:n]) for n in (1, 2, 3, 4)}) == 4
    assert column(run, "eval_kl")[-1] == pytest.approx(expected, rel=1e-4)
    assert run.evaluate()["eval_kl"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("options", [{"bf16": True}, {"perturbation": "low_rank"}])
def test_it_is_exactly_zero_while_the_weights_are_those_of_the_start(trainer, rows, options):
    run = trainer(eval_dataset=rows, eval_kl_prompts=4, learning_rate=0.0, eval_on_start=True, **EVALUATED, **options)
    assert run.evaluate()["eval_kl"] == 0.0
    run.train()
    assert column(run, "eval_kl") == [0.0] * 4  # on start, and after three steps
    run.model.model.norm.weight.data *= 2
    assert run.evaluate()["eval_kl"] > 0


def test_it_is_of_each_dataset(trainer, model_folder, rows, dataset, tmp_path):
    sets = {"task": dataset, "other": rows.select([1, 2]).to_iterable_dataset()}
    run = trainer(eval_dataset=sets, eval_kl_prompts=3, **EVALUATED)
    run.train()
    run.save_model(str(tmp_path / "trained"))
    start, now = (AutoModelForCausalLM.from_pretrained(path) for path in (model_folder, tmp_path / "trained"))
    metrics = run.evaluate()
    # The other set has fewer rows than are asked for
    for name, prompts in (("task", dataset["prompt"][:3]), ("other", ["Say one", "Say two"])):
        assert metrics[f"eval_{name}_kl"] == pytest.approx(by_hand(start, now, prompts), rel=1e-4)
    assert "eval_kl" not in metrics


def test_it_is_left_out_without_the_field_and_of_prompts_that_the_start_did_not_read(trainer, rows):
    run = trainer(max_steps=1)
    run.train()
    assert "eval_kl" not in run.evaluate()
    run = trainer(eval_kl_prompts=2, max_steps=1)
    run.train()
    assert "eval_kl" in run.evaluate() and "eval_kl" not in run.evaluate(rows)


def test_it_is_plotted(trainer, tmp_path):
    trainer(eval_kl_prompts=2, save_strategy="steps", save_steps=1, **EVALUATED).train()
    plot([str(tmp_path / "run"), "--metric", "eval_kl", "--output", str(tmp_path / "kl.png")])
    assert (tmp_path / "kl.png").stat().st_size > 0


def test_it_changes_nothing_about_the_run(trainer, tmp_path):
    plain, measured = (
        trainer(output_dir=str(tmp_path / str(number)), eval_kl_prompts=number, **EVALUATED) for number in (0, 3)
    )
    plain.train()
    measured.train()
    assert column(plain, "eval_reward") == column(measured, "eval_reward")
    assert torch.equal(plain.model.lm_head.weight, measured.model.lm_head.weight)


def test_an_adapter_drifts_from_the_model_without_it(trainer, model_folder, tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = trainer(peft_config=adapter, eval_kl_prompts=2, learning_rate=0.2)
    run.train()
    start = AutoModelForCausalLM.from_pretrained(model_folder)
    merged = run.model.merge_and_unload()
    prompts = run.eval_dataset["prompt"][:2]
    assert run.evaluate()["eval_kl"] == pytest.approx(by_hand(start, merged, prompts), rel=1e-3)


def test_tokens_that_a_model_never_gives_do_not_count():
    start, now = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[np.log(3.0), 0.0, -torch.inf]])
    expected = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert kl_divergence(start, now).tolist() == pytest.approx([expected])
    assert kl_divergence(start, torch.tensor([[0.0, -torch.inf, -torch.inf]])).tolist() == [np.inf]


def test_a_small_divergence_is_not_lost_in_rounding_errors():
    """Of two answers with probabilities 1/2 + d and 1/2 - d, it is 2 d**2 + O(d**4): the Fisher information's half."""
    d = 1e-6
    start, now = torch.zeros(1, 2), torch.tensor([[np.log((0.5 + d) / (0.5 - d)), 0.0]])
    assert kl_divergence(start, now).item() == pytest.approx(2 * d**2, rel=1e-3)


# ---- where a run begins ----


def test_a_further_call_of_train_keeps_the_start(trainer, model_folder, rows, tmp_path):
    run = trainer(eval_dataset=rows, eval_kl_prompts=2)
    run.train()
    before = run.evaluate()["eval_kl"]
    run.train()
    run.save_model(str(tmp_path / "trained"))
    start, now = (AutoModelForCausalLM.from_pretrained(path) for path in (model_folder, tmp_path / "trained"))
    assert run.evaluate()["eval_kl"] == pytest.approx(by_hand(start, now, rows["prompt"][:2]), rel=1e-4)
    assert run.evaluate()["eval_kl"] != before


SAVED = {"save_strategy": "steps", "save_steps": 1, "eval_kl_prompts": 3, **EVALUATED}


@pytest.mark.parametrize("checkpoint", [True, "checkpoint-2"])
def test_a_resumed_run_measures_from_the_same_start(trainer, tmp_path, checkpoint):
    whole = trainer(**SAVED)
    whole.train()
    if checkpoint is True:  # the history alone
        for folder in (tmp_path / "run").glob("checkpoint-*"):
            folder.rename(tmp_path / folder.name)
    resumed = trainer(**SAVED)
    resumed.train(resume_from_checkpoint=checkpoint if checkpoint is True else str(tmp_path / "run" / checkpoint))
    assert column(resumed, "eval_kl")[-1] == column(whole, "eval_kl")[-1] > 0


def test_resuming_with_another_model_than_that_of_the_start_is_refused(trainer, tmp_path):
    trainer(**SAVED).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    run = trainer(model=checkpoint, **SAVED)
    with pytest.raises(ValueError, match="`eval_kl_prompts=3`.*began with other weights than `model` has.*it to 0"):
        run.train(resume_from_checkpoint=checkpoint)
    trainer(model=checkpoint, **SAVED | {"eval_kl_prompts": 0}).train(resume_from_checkpoint=checkpoint)


# ---- what cannot be measured ----


def test_an_empty_stream_is_refused_as_without_it(trainer, rows):
    nothing = rows.to_iterable_dataset().filter(lambda row: False)
    with pytest.raises(ValueError, match="`eval_dataset` is empty"):
        trainer(eval_dataset=nothing, eval_kl_prompts=2, **EVALUATED).train()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eval_kl_prompts": -1}, "must not be negative"),
        ({"eval_dataset": None}, "give one, or set it to 0"),
        ({"use_vllm": True}, "set it to 0, or use_vllm=False"),
        ({"use_vllm": True, "vllm_mode": "server"}, "set it to 0, or use_vllm=False"),
        ({"agent_func": lambda example, endpoint: 1.0}, "rows of `agent_func`.*Set it to 0"),
        ({"rollout_func": lambda prompts, trainer: {}}, "`rollout_func`.*it to 0"),
    ],
)
def test_it_is_refused_before_the_model_is_loaded(trainer, options, said):
    with pytest.raises(ValueError, match=f"(?i)`eval_kl_prompts=-?[0-9]+` is not valid: .*{said}"):
        trainer(model="a-name/that-no-model-has", **{"eval_kl_prompts": 2} | options)


def test_it_is_refused_where_all_processes_run_the_model_together(config):
    args = config(eval_kl_prompts=2, ds3_gather_for_generation=False)
    with pytest.raises(ValueError, match="`eval_kl_prompts=2`.*Set it to 0, or ds3_gather_for_generation=True"):
        Lockstep.check_arguments(args, TrainerInputs("a-name/that-no-model-has"))
