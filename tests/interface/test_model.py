"""`model`, `quantization_config`, `peft_config` and `trust_remote_code`, as GRPOTrainer documents them."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, letters, logs, make_judge, make_model, make_tokenizer
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from es_trainer import ESConfig, ESTrainer


def adapter() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")


@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
@pytest.mark.parametrize("perturbation", ["gaussian", "low_rank"])
def test_an_adapter_of_a_quantized_model(trainer, tmp_path, options, perturbation):
    folder = str(tmp_path / "wide")  # enough for a block of the quantization
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    run = trainer(
        folder,
        quantization_config=BitsAndBytesConfig(**options),
        peft_config=adapter(),
        perturbation=perturbation,
        sigma=0.5,
    )
    assert run.model.base_model.model.model.layers[0].mlp.up_proj.weight.dtype in (torch.uint8, torch.int8)
    assert {name.split(".")[-3] for name in (shard.name for shard in run.optimizer.weights.shards)} == {
        "lora_A",
        "lora_B",
    }
    run.evaluate()  # the first time, 4-bit weights are packed for the CPU
    frozen = {name: p.clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    run.train()
    assert all(torch.equal(p, frozen[name]) for name, p in run.model.named_parameters() if name in frozen)
    assert logs(run)[-1]["distance_from_start"] > 0
    run.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    trained = {name for name, p in loaded.named_parameters() if "lora_B" in name and p.abs().sum() > 0}
    assert len(trained) == 4


def test_quantized_weights_without_an_adapter_are_refused_before_loading(trainer):
    for options in (
        {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
        {"model_init_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}},
    ):
        with pytest.raises(ValueError, match="`quantization_config` without `peft_config`"):
            trainer(model="no/such-model", **options)


def test_a_quantization_for_a_loaded_model_is_refused(trainer):
    with pytest.raises(ValueError, match="(?s)`quantization_config=.*` is for models given as a string"):
        trainer(make_model(), quantization_config=BitsAndBytesConfig(load_in_4bit=True), peft_config=adapter())


def test_two_quantizations_are_refused(trainer):
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="to the trainer and in `model_init_kwargs`"):
        trainer(quantization_config=quantization, model_init_kwargs={"quantization_config": quantization})


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path) -> str:
    """A model that is defined by code in its folder."""
    folder = tmp_path / "own"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "modeling_own.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_code_of_a_models_repository_runs_only_when_trusted(trainer, own_code):
    run = trainer(own_code, processing_class=None, trust_remote_code=True, max_steps=1)
    assert type(run.model).__name__ == "OwnModel"
    run.train()
    with pytest.raises(ValueError, match="trust_remote_code"):
        trainer(own_code, processing_class=None)


def test_a_path(trainer, model_folder):
    assert type(trainer(Path(model_folder)).model).__name__ == "LlamaForCausalLM"
    for path in ("/no/such/folder", "no/such/folder"):
        with pytest.raises(FileNotFoundError, match="there is no such folder"):
            trainer(Path(path))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )


SIZES = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def bert(**options) -> BertLMHeadModel:
    return BertLMHeadModel(BertConfig(**SIZES, num_attention_heads=4, **options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (t5, "T5ForConditionalGeneration, an encoder-decoder"),
        (make_judge, "LlamaForSequenceClassification, which cannot generate"),
        (lambda: LlamaModel(LlamaConfig(**TINY)), "LlamaModel, which cannot generate"),
        (
            lambda: get_peft_model(make_judge(), LoraConfig(target_modules=["q_proj"])),
            "LlamaForSequenceClassification",
        ),
        (bert, "BertLMHeadModel with `is_decoder=False`"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)), "Sequential, but must be"),
        (lambda: torch.nn.DataParallel(make_model()), "DataParallel, but must be.*give the model itself"),
        (lambda: pipeline("text-generation", make_model(), tokenizer=make_tokenizer()), "TextGenerationPipeline"),
        (lambda: None, "NoneType, but must be"),
    ],
)
def test_what_is_no_causal_language_model(dataset, make, message):
    for args in (None, ESConfig("run", use_cpu=True, bf16=False)):
        with pytest.raises(TypeError, match=f"`model` is a {message}"):
            ESTrainer(make() or None, letters, args, train_dataset=dataset, processing_class=make_tokenizer())


@pytest.mark.parametrize(
    "make",
    [
        lambda: bert(is_decoder=True),
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_attention_heads=4)),
        lambda: BartForCausalLM(BartConfig(vocab_size=259, d_model=32, decoder_layers=1, decoder_attention_heads=4)),
    ],
)
def test_causal_language_models_whose_config_looks_like_another(trainer, make):
    trainer(make())


def test_a_folder_with_an_encoder(trainer, tmp_path):
    bert().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="`model` is a BertLMHeadModel with `is_decoder=False`"):
        trainer(str(tmp_path))


def test_a_model_without_a_name(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="`processing_class` is missing: `model` is a LlamaForCausalLM without a name"
    ):
        ESTrainer(make_model(), letters, train_dataset=dataset)
    run = ESTrainer(
        make_model(max_position_embeddings=4096), letters, train_dataset=dataset, processing_class=make_tokenizer()
    )
    assert Path(run.args.output_dir).resolve() == (tmp_path / "LlamaForCausalLM-ES").resolve()


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_devices_without_noise(config, dataset, monkeypatch, device):
    args = config()
    monkeypatch.setattr(ESConfig, "device", torch.device(device))
    with pytest.raises(ValueError, match=f"The device is '{device}'.*Set use_cpu=True"):
        ESTrainer("no/such-model", letters, args, train_dataset=dataset)


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_special_tokens_beyond_the_embedding(trainer, name):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({name: "[NEW]"})
    with pytest.raises(ValueError, match=rf"`tokenizer.{name}` is '\[NEW\]' with the id 259.*259 rows.*resize_tok"):
        trainer(processing_class=tokenizer)
    model = make_model()
    model.resize_token_embeddings(len(tokenizer))
    trainer(model, processing_class=tokenizer)


def test_an_embedding_with_more_rows_than_tokens(trainer):
    run = trainer(make_model(vocab_size=320), max_steps=1)
    run.train()
    assert len(logs(run)) == 1


def test_prompts_with_tokens_beyond_the_embedding(trainer, dataset):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    trainer(processing_class=tokenizer)  # no prompt has it
    rows = dataset.map(lambda row: {"prompt": row["prompt"] + "<think>"})
    message = "Prompt 0 has the token '<think>' with the id 259"
    with pytest.raises(ValueError, match=message):
        trainer(processing_class=tokenizer, eval_dataset=rows)
    run = trainer(processing_class=tokenizer, train_dataset=rows.to_iterable_dataset())
    with pytest.raises(ValueError, match=message):
        run.train()


def test_a_model_on_several_devices_is_refused(trainer):
    model = make_model(tie=False)
    model.lm_head.to("meta")  # as if it was offloaded
    with pytest.raises(ValueError, match=r"several devices \(cpu, meta; `device_map`\).*zero3.yaml"):
        trainer(model)
    model = make_model()
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1, "lm_head": 0}
    with pytest.raises(ValueError, match=r"several devices \(0, 1; `device_map`\)"):
        trainer(model)
    with pytest.raises(ValueError, match=r"several devices \(0, 1; `device_map`\)"):
        trainer(get_peft_model(model, adapter()))


def test_a_model_loaded_onto_several_devices_is_refused(trainer, tmp_path):
    places = {"model": "cpu", "lm_head": "disk"}
    options = {"device_map": places, "offload_folder": str(tmp_path / "offloaded")}
    make_model(tie=False).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"several devices \(cpu, disk; `device_map`\)"):
        trainer(str(tmp_path / "model"), model_init_kwargs=options)
    trainer(str(tmp_path / "model"), model_init_kwargs={"device_map": {"": "cpu"}})


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_adapters_outside_of_the_models_layers_are_refused(trainer, kind):
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match=f"`peft_config` has a {kind.__name__}"):
        trainer(peft_config=config)
    with pytest.raises(ValueError, match=f"`model` has a {kind.__name__}"):
        trainer(get_peft_model(make_model(), config))
