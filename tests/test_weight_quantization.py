"""Runs whose members share weights that are stored in 8 bits."""

import json
from pathlib import Path

import pytest
import torch
from conftest import assert_same, logs, make_model, make_tokenizer, weights
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from es_trainer import replay
from es_trainer.weights.codecs import CODECS
from es_trainer.weights.quantized import QuantizedMatrix


EIGHT_BITS = {"perturbation": "low_rank", "weight_quantization": "int8"}


def saved(trainer, folder: Path) -> dict[str, torch.Tensor]:
    trainer.save_model(str(folder))
    return weights(AutoModelForCausalLM.from_pretrained(folder))


def round_trip(values: torch.Tensor, kind: str) -> torch.Tensor:
    matrix = QuantizedMatrix.of(CODECS[kind], values, torch.float32, values.device)
    return matrix.codes.float() * matrix.scales


def with_quantized_matrices(model, kind: str):
    """A model with ordinary weights that have the values of quantized ones."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = round_trip(parameter.data, kind)
    return model


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("tie", [True, False])
def test_members_add_their_terms_to_the_quantized_weights(trainer, kind, tie, tmp_path):
    """The rewards of the first population are those of a model that has the quantized weights' values."""
    quantized = trainer(make_model(tie=tie), perturbation="low_rank", weight_quantization=kind, max_steps=1)
    plain = trainer(
        with_quantized_matrices(make_model(tie=tie), kind), perturbation="low_rank", output_dir=str(tmp_path / "plain")
    )
    for each in (quantized, plain):
        each.args.max_steps = 1
        each.train()
    first, second = (json.loads(line)["rewards"] for line in (line_of(quantized), line_of(plain)))
    assert first == second


def line_of(trainer) -> str:
    return (Path(trainer.args.output_dir) / "history.jsonl").read_text().splitlines()[1]


def test_updates_go_to_the_masters(trainer, tmp_path):
    """From the same seeds and rewards, the weights become the same bits as without quantization."""
    run = trainer(make_model(), **EIGHT_BITS)
    run.train()
    end = saved(run, tmp_path / "end")
    assert_same(weights(replay(make_model(), run.args.output_dir)), end)
    assert any(not torch.equal(end[name], start) for name, start in weights(make_model()).items())
    # And what answers is the last update's model, quantized
    for shard in run.optimizer.weights.shards:
        if shard.layout.quantized:
            expected = round_trip(end[shard.name], "int8")
            assert torch.equal(shard.working.codes.float() * shard.working.scales, expected), shard.name


def test_a_run_resumes_exactly(trainer, tmp_path):
    options = {**EIGHT_BITS, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(make_model(), **options)
    whole.train()
    resumed = trainer(make_model(), **options, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert_same(saved(resumed, tmp_path / "a"), saved(whole, tmp_path / "b"))
    assert [log["reward"] for log in logs(resumed)][-2:] == [log["reward"] for log in logs(whole)][-2:]


def test_the_best_model_is_loaded_at_the_end(trainer, tmp_path):
    run = trainer(
        make_model(),
        **EIGHT_BITS,
        max_steps=3,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="reward",
        learning_rate=2.0,  # so large that the first update is not the last
    )
    run.train()
    best = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    assert_same(saved(run, tmp_path / "end"), weights(best))


def test_evaluation_reads_the_quantized_weights(trainer, tmp_path):
    quantized = trainer(make_model(), **EIGHT_BITS)
    plain = trainer(with_quantized_matrices(make_model(), "int8"), output_dir=str(tmp_path / "plain"))
    assert quantized.evaluate()["eval_reward"] == plain.evaluate()["eval_reward"]


def test_matrices_take_a_byte_a_weight(trainer):
    run = trainer(make_model(), **EIGHT_BITS, master_weights="host")
    run.train()
    matrices = [shard for shard in run.optimizer.weights.shards if len(shard.shape) == 2]
    assert len(matrices) == 2 * 7 + 1
    for shard in matrices:
        assert isinstance(shard.working, QuantizedMatrix) and shard.parameter.numel() == 0
        assert shard.working.stored_bytes == shard.shape.numel() + 4 * shard.shape[0]


def test_the_dtype_of_the_model_is_that_of_its_checkpoints(trainer, tmp_path):
    run = trainer(make_model(dtype=torch.bfloat16), **EIGHT_BITS, bf16=True)
    run.train()
    run.save_model(str(tmp_path / "end"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "end", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_perturbation_that_does_not_reach_the_model_is_found(trainer):
    run = trainer(make_model(), **EIGHT_BITS)
    del vars(run.model.model.layers[0].mlp.up_proj)["weight"]
    with pytest.raises(RuntimeError, match="layers.0.mlp.up_proj.weight"):
        run.train()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"perturbation": "gaussian"}, "weight_quantization"),
        ({"weight_quantization": "int4"}, "weight_quantization"),
        ({"master_weights": "none"}, "master_weights"),
        ({"population_batch_size": 1}, "population_batch_size"),
        ({"peft_config": LoraConfig(task_type="CAUSAL_LM")}, "peft_config"),
        ({"rollout_func": lambda prompts, trainer: {}}, "rollout_func"),
        ({"use_vllm": True}, "weight_quantization"),
        ({"save_only_model": True, "load_best_model_at_end": True, "save_strategy": "steps"}, "save_only_model"),
    ],
)
def test_what_cannot_be_quantized_is_refused_before_loading(trainer, options, field):
    if "save_only_model" in options:
        options = {**options, "eval_strategy": "steps", "metric_for_best_model": "reward"}
    with pytest.raises(ValueError, match=field):
        trainer("nobody/nothing", **{**EIGHT_BITS, **options})


def test_matrices_of_other_modules_stay_and_are_named(trainer, caplog):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=259, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    config.initializer_range = 0.3
    run = trainer(GPT2LMHeadModel(config), **EIGHT_BITS, processing_class=make_tokenizer())
    assert "transformer.h.0.attn.c_attn.weight" in caplog.text
    run.train()
    quantized = {shard.name for shard in run.optimizer.weights.shards if shard.layout.quantized}
    assert quantized == {"transformer.wte.weight", "transformer.wpe.weight"}
