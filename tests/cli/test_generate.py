import json

import pytest
import torch
from conftest import make_model, make_tokenizer

from es_trainer.cli import main
from es_trainer.cli.generate import GenerateArguments, generate
from es_trainer.cli.generation import Generator


PROMPTS = ["Say one", "Say another one"]


@pytest.fixture
def complete(model_folder):
    def call(**options) -> list[list[str]]:
        defaults = {"model_name_or_path": model_folder, "prompts": PROMPTS, "use_cpu": True}
        prompts, completions = generate(GenerateArguments(**{**defaults, "max_completion_length": 8, **options}))
        assert prompts == PROMPTS
        return completions

    return call


def expected(text: str, seed: int = 0, **options) -> str:
    """What the model's own `generate` makes of it."""
    model, tokenizer = make_model(seed), make_tokenizer()
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat(*messages: tuple[str, str]) -> str:
    messages = [{"role": role, "content": content} for role, content in messages]
    return make_tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_prompts_are_messages_of_a_user(complete):
    assert complete() == [[expected(chat(("user", prompt))) for prompt in PROMPTS]]


def test_prompts_as_text(complete):
    assert complete(chat_template=False) == [[expected(prompt) for prompt in PROMPTS]]


def test_a_tokenizer_without_chat_template(complete, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert complete(model_name_or_path=str(tmp_path)) == [[expected(prompt) for prompt in PROMPTS]]


def test_a_system_prompt(complete):
    (completions,) = complete(system_prompt="Be brief.")
    assert completions[0] == expected(chat(("system", "Be brief."), ("user", PROMPTS[0])))


@pytest.mark.parametrize(("dtype", "loaded"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_dtype(model_folder, dtype, loaded):
    config = GenerateArguments(model_folder, prompts=PROMPTS, use_cpu=True, dtype=dtype).to_config()
    assert Generator(model_folder, config).model.dtype == loaded


def test_two_models_side_by_side(model_folder, tmp_path, capsys, monkeypatch):
    make_model(seed=1).save_pretrained(tmp_path / "trained")
    make_tokenizer().save_pretrained(tmp_path / "trained")
    (tmp_path / "prompts.txt").write_text("Say one\n\nSay another one\n")
    letters = make_tokenizer().convert_tokens_to_ids(list("abcdefghij"))
    only_letters = {"suppress_tokens": sorted(set(range(259)) - set(letters))}  # to have them printed as they are
    monkeypatch.setenv("COLUMNS", "400")
    argv = ["--model_name_or_path", str(tmp_path / "trained"), "--compare_to", model_folder, "--use_cpu"]
    argv += ["--prompts_file", str(tmp_path / "prompts.txt"), "--max_completion_length", "8"]
    assert main(["generate", *argv, "--generation_kwargs", json.dumps(only_letters)]) == 0
    lines = capsys.readouterr().out.replace("┃", "│").splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert ["Prompt", model_folder, str(tmp_path / "trained")] in cells
    for prompt in PROMPTS:
        before, after = (expected(chat(("user", prompt)), seed, **only_letters) for seed in (0, 1))
        assert before != after
        assert [prompt, before, after] in cells


@pytest.mark.parametrize("options", [{"prompts": None}, {"prompts_file": "prompts.txt"}])
def test_prompts_come_from_one_place(complete, options):
    with pytest.raises(ValueError, match="either `prompts` or `prompts_file`"):
        complete(**options)


def test_a_file_without_prompts(complete, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"`prompts_file='.*prompts.txt'` has no lines"):
        complete(prompts=None, prompts_file=str(tmp_path / "prompts.txt"))
