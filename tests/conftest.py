"""Tiny models and tokenizers, built in a second."""

import json
import os
import tempfile
from importlib.util import find_spec
from inspect import signature
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests' models are made here; nothing is asked of the Hub
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="trackio-"))

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from es_trainer import ESConfig, ESTrainer, replay


needs_reasoning_gym = pytest.mark.skipif(
    find_spec("reasoning_gym") is None,
    reason="its dependency pycosat was not compiled",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges: one token a byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        **options,
    )


TINY = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, tie: bool = True, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, "tie_word_embeddings": tie, **config})).to(dtype)


def save_tiny(folder: Path, **options) -> str:
    """A folder with a tiny model and its tokenizer, for `from_pretrained`."""
    make_model(**options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def make_judge() -> LlamaForSequenceClassification:
    """A reward model."""
    torch.manual_seed(7)
    return LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=1))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    make_judge().save_pretrained(folder / "judge")
    make_tokenizer().save_pretrained(folder / "judge")
    return str(folder)


@pytest.fixture
def dataset() -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"Say {word}", "answer": word} for word in "one two three four five six".split()]
    )


TINY_RUN = {
    "use_cpu": True,
    "bf16": False,
    "population_size": 4,
    "evaluate_center": False,  # tests/run/test_learning.py is about it
    "sigma": 0.05,
    "learning_rate": 0.02,
    "per_device_train_batch_size": 2,
    "max_completion_length": 8,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
}


@pytest.fixture
def config(tmp_path):
    """Make an ESConfig for a tiny run."""

    def make(**options) -> ESConfig:
        return ESConfig(**{"output_dir": str(tmp_path / "run"), **TINY_RUN, **options})

    return make


def letters(completions, **kwargs) -> list[float]:
    """Share of lower-case letters: differs between members, and needs no data."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(ch.islower() for ch in text) / (len(text) + 1) for text in texts]


@pytest.fixture
def reward():
    return letters


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.fixture
def trainer(model_folder, dataset, reward, config):
    """Make an ESTrainer for a tiny run."""

    def make(model=None, reward_funcs=reward, **options) -> ESTrainer:
        given = {"train_dataset": dataset, "eval_dataset": dataset, "processing_class": make_tokenizer()}
        for name in list(signature(ESTrainer.__init__).parameters)[4:]:
            if name in options:
                given[name] = options.pop(name)
        return ESTrainer(model_folder if model is None else model, reward_funcs, config(**options), **given)

    return make


def history(folder: str | Path) -> list[dict]:
    """The lines of the updates of a run, by its folder."""
    _, *lines = map(json.loads, (Path(folder) / "history.jsonl").read_text().splitlines())
    return lines


def assert_replays_and_resumes(
    trainer, whole: ESTrainer, tmp_path: Path, reward_funcs=letters, **options
) -> ESTrainer:
    """That a run is replayed, and resumed from its checkpoint after two steps, exactly. Returns the resumed one."""
    assert_same(weights(replay(make_model(), whole.args.output_dir)), weights(whole.model))
    resumed = trainer(make_model(), reward_funcs, **options | {"output_dir": str(tmp_path / "resumed")})
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert_same(weights(resumed.model), weights(whole.model))
    return resumed


def logs(trainer: ESTrainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "loss" in log]
