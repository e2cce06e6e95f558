"""Models that read images."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import assert_same, letters, logs, make_model, make_tokenizer, weights
from datasets import Dataset, Image
from safetensors.torch import load_file
from tiny_vision import FAMILIES, make_tiny, picture, question, with_pictures
from transformers import AutoModelForImageTextToText, Gemma3ForConditionalGeneration, Gemma3Processor, GenerationConfig
from trl.data_utils import prepare_multimodal_messages

from es_trainer import ESTrainer, replay
from es_trainer.cli import main
from es_trainer.data import collate, has_images
from es_trainer.run import fingerprint


HERE = Path(__file__).parent
NEW = 8  # tokens of a completion


@pytest.fixture
def see(trainer):
    """Make an ESTrainer that trains a tiny model on pictures."""

    def make(family: str = "gemma3", dataset: Dataset | None = None, **options) -> ESTrainer:
        model, processor = make_tiny(family)
        data = with_pictures() if dataset is None else dataset
        given = {"train_dataset": data, "eval_dataset": data, "processing_class": processor, **options}
        return trainer(given.pop("model", model), **given)

    return make


def own_answer(family: str, prompt: list, images: list) -> list[int]:
    """What the model's own `generate` says to a prompt alone, by the processor's own chat template."""
    model, processor = make_tiny(family)
    messages = prepare_multimodal_messages(prompt, images)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    config = GenerationConfig(max_new_tokens=NEW, eos_token_id=2, pad_token_id=0, do_sample=False)
    return model.generate(**inputs, generation_config=config)[0, inputs["input_ids"].shape[1] :].tolist()


def answers(run: ESTrainer, rows: list[dict], **options) -> list[list[int]]:
    prompts = run.engine.tokenize([row["prompt"] for row in collate(rows, "rows")])
    return [completion.ids for completion in run.engine.generate(prompts, seed=0, **options)]


# ---- what the model reads ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [None, 1])
def test_completions_are_those_of_the_models_own_generate(see, family, size):
    run = see(family)
    rows = list(with_pictures())
    expected = [own_answer(family, row["prompt"], [row["image"]]) for row in rows]
    assert len(set(map(tuple, expected))) > 1
    assert answers(run, rows, batch_size=size) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_one_image_with_several_and_without(see, family):
    images = [[picture(0)], [], None, [picture(1), picture(2, width=64)]]
    rows = [{"prompt": question(f"What is {i}?"), "images": some} for i, some in enumerate(images)]
    run = see(family)
    expected = [own_answer(family, row["prompt"], row["images"] or []) for row in rows]
    assert answers(run, rows) == expected
    assert answers(run, rows) == expected  # and nothing is left in the model of those before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_pixel_changes_the_input_and_the_logits(see, family):
    run = see(family)
    image = picture(0)
    other = image.copy()
    other.putpixel((17, 9), (255, 0, 255))
    rows = [{"prompt": question("What is it?"), "image": some} for some in (image, other)]
    first, second = run.engine.tokenize([row["prompt"] for row in collate(rows, "rows")])
    assert first == second  # the tokens
    pixels = [run.engine.images.inputs([prompt])["pixel_values"] for prompt in (first, second)]
    assert not torch.equal(*pixels)
    assert not torch.equal(run.engine.logits(first, 1), run.engine.logits(second, 1))


def test_images_of_a_file_of_bytes_and_in_messages(see, tmp_path):
    path = tmp_path / "picture.png"
    picture(3).save(path)
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image", "image": picture(3), "text": None}]
    rows = [
        {"prompt": question("What is it?"), "image": picture(3)},
        {"prompt": question("What is it?"), "image": str(path)},
        {"prompt": question("What is it?"), "image": {"bytes": path.read_bytes(), "path": None}},
        {"prompt": [{"role": "user", "content": parts[::-1]}]},
    ]
    run = see()
    ids = answers(run, rows)
    assert ids == [own_answer("gemma3", question("What is it?"), [picture(3)])] * 4
    assert answers(run, [{"prompt": [{"role": "user", "content": parts}]}]) != ids[:1]  # the text before the image
    texts = Dataset.from_list([{"prompt": question("a")}])
    in_messages = Dataset.from_list(rows[3:])
    assert has_images(in_messages) and has_images(in_messages.to_iterable_dataset())
    assert has_images(texts.with_transform(lambda batch: {"prompt": [rows[3]["prompt"]] * len(batch["prompt"])}))
    assert not has_images(texts) and not has_images(texts.to_iterable_dataset())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "llava_next"])
def test_what_is_trained_is_what_a_gradient_would_reach(see, family):
    model, processor = make_tiny(family)
    prompt = prepare_multimodal_messages(question("What is 0?"), [picture(0)])
    inputs = processor.apply_chat_template(prompt, tokenize=True, return_dict=True, return_tensors="pt")
    model(**inputs).logits.sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("visi" in name or "visual" in name for name in reached)
    trained = {name for name, p in see(family).model.named_parameters() if p.requires_grad}
    assert trained == reached


def test_a_stream_says_by_its_first_row_what_is_trained(see):
    rows = list(with_pictures())
    stream = Dataset.from_list(rows).to_iterable_dataset().map(lambda row: row)  # of which no columns are known
    assert stream.column_names is None
    run = see(dataset=stream, eval_dataset=None, max_steps=1, remove_unused_columns=True)
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in see().model.named_parameters() if p.requires_grad}
    seen = []
    run.engine.images.inputs = lambda prompts, inputs=run.engine.images.inputs: seen.append(prompts) or inputs(prompts)
    run.train()
    assert seen  # though columns that nobody reads are removed


def test_without_images_the_tower_is_frozen(see):
    run = see("gemma3", Dataset.from_list([{"prompt": question("Hi")}] * 4))
    assert not any("vision" in name for name, p in run.model.named_parameters() if p.requires_grad)
    run.train()
    assert len(logs(run)) == 3


# ---- population batches ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{"perturbation": "low_rank"}, {"population_batch_size": 4}], ids=["low_rank", "full"]
)
def test_members_together_answer_as_they_do_alone(see, family, options):
    run = see(family, **options)
    assert run.population_batch is not None
    assert not any("visi" in name or "visual" in name for name, p in run.model.named_parameters() if p.requires_grad)
    rows = list(with_pictures(3))
    run.optimizer.sigma = 0.5
    members = list(run.optimizer.ask())
    alone = []
    for member in members:
        run.optimizer.perturb(member)
        alone += answers(run, rows)
    run.optimizer.restore()
    assert len(set(map(tuple, alone))) > len(rows)
    with run.population_batch.install(members, run.optimizer.sigma) as installed:
        assert answers(run, rows, members=installed) == alone
        assert answers(run, rows, members=installed, batch_size=5) == alone


# ---- runs ----


OPTIONS = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_kl_prompts": 2,
    "skip_settled_prompts": 0.5,
    "population_size_schedule": {1: 6},
    "temperature": 1.0,
    "bf16": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A model and its processor."""
    path = tmp_path_factory.mktemp("vision")
    for part in make_tiny("gemma3"):
        part.save_pretrained(path)
    return str(path)


def test_a_run_by_name_is_saved_resumed_and_replayed(trainer, folder, tmp_path):
    data = {"train_dataset": with_pictures(), "eval_dataset": with_pictures(2, first=8), "processing_class": None}
    whole = trainer(folder, **data, **OPTIONS)
    assert isinstance(whole.model, Gemma3ForConditionalGeneration)
    assert isinstance(whole.processing_class, Gemma3Processor)
    whole.train()
    whole.save_model()
    assert any(log.get("eval_kl", 0) > 0 for log in whole.state.log_history)

    output = Path(whole.args.output_dir)
    resumed = trainer(folder, **data, **OPTIONS, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    assert_same(weights(resumed.model), weights(whole.model))

    assert_same(weights(replay(folder, output)), weights(whole.model))
    options = {"model_name_or_path": folder, "history": output, "output_dir": tmp_path / "replayed"}
    assert main(["replay", *(str(text) for name, value in options.items() for text in (f"--{name}", value))]) == 0
    for saved in (output, output / "checkpoint-4", tmp_path / "replayed"):
        assert Gemma3Processor.from_pretrained(saved).image_seq_length == 4
        model = AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.float32)
        assert_same(weights(model), weights(whole.model))
    card = (output / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card and "AutoProcessor.from_pretrained" in card


def test_the_best_model_is_loaded_whatever_its_parameters_are_called_in_files(trainer, folder):
    of_steps = iter([3.0, 2.0, 1.0])

    def reward(completions, trainer_state, **kwargs):
        falling = next(of_steps) if len(completions) == 1 else 0.0  # of the evaluation
        return [falling + value for value in letters(completions)]

    run = trainer(
        folder,
        reward,
        **{"train_dataset": with_pictures(), "eval_dataset": with_pictures(1, first=8), "processing_class": None},
        **{"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
        **{"load_best_model_at_end": True, "save_only_model": True, "max_steps": 3, "learning_rate": 0.5},
    )
    run.train()
    best = Path(run.args.output_dir) / "checkpoint-1"
    assert run.state.best_model_checkpoint == str(best)
    assert "model.language_model.norm.weight" not in load_file(best / "model.safetensors")
    saved = AutoModelForImageTextToText.from_pretrained(best)
    assert_same(weights(run.model), weights(saved))
    assert not torch.equal(run.model.lm_head.weight, make_tiny("gemma3")[0].lm_head.weight)


@pytest.mark.slow
def test_two_processes_train_the_same_weights(tmp_path):
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    for number in (1, 2):
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
        script = [str(HERE / "images_run.py"), str(tmp_path / str(number))]
        subprocess.run([sys.executable, *command, *script], check=True, env=environment, timeout=300)
    one, two = (load_file(tmp_path / number / "final" / "model.safetensors") for number in "12")
    assert_same(one, two)


def test_rewards_get_the_columns_and_prompts_with_the_images(see):
    seen = []

    def reward(prompts, completions, image, answer, **kwargs):
        seen.extend(zip(prompts, image, answer, strict=True))
        return letters(completions)

    rows = with_pictures().add_column("answer", list("abcd"))
    see(dataset=rows, reward_funcs=reward, max_steps=1).train()
    assert seen
    for prompt, image, answer in seen:
        number = "abcd".index(answer)
        assert np.array_equal(image, picture(number, 32 + 32 * (number % 2)))
        assert prompt == prepare_multimodal_messages(question(f"What is {number}?"), [image])


def test_the_drift_is_of_prompts_that_differ_in_their_images_alone(see):
    rows = Dataset.from_list([{"prompt": question("What is it?"), "image": picture(i)} for i in range(2)])
    run = see(dataset=rows, eval_kl_prompts=2, learning_rate=0.5)
    before, _ = make_tiny("gemma3")
    run.train()
    inputs = [
        run.processing_class.apply_chat_template(
            prepare_multimodal_messages(row["prompt"], [row["image"]]),
            **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"},
        )
        for row in rows
    ]
    with torch.no_grad():
        start, end = ([model(**i).logits[0].log_softmax(-1).double() for i in inputs] for model in (before, run.model))
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(start, end, strict=True)]).mean().item()
    assert kl > 1e-3
    assert run.evaluate()["eval_kl"] == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("multimodal", [True, False])
def test_completions_are_logged_with_their_images(see, tmp_path, multimodal):
    run = see(max_steps=1, log_completions=True, log_multimodal=multimodal)
    run.train()
    table = pyarrow.parquet.read_table(Path(run.args.output_dir) / "completions" / "completions_00001.parquet")
    prompts = table["prompt"].to_pylist()
    assert all([part["type"] for part in prompt[0]["content"]] == ["image", "text"] for prompt in prompts)
    assert ("images" in table.column_names) == multimodal
    if multimodal:
        for prompt, images in zip(prompts, table["images"].to_pylist(), strict=True):
            (number,) = (int(char) for char in prompt[0]["content"][1]["text"] if char.isdigit())
            shown = Image().decode_example(images[0])
            assert np.array_equal(shown, picture(number, 32 + 32 * (number % 2)))


def test_the_fingerprint_has_the_content_of_images(tmp_path):
    path = tmp_path / "picture.png"

    def facts(image, content) -> dict:
        content.save(path)
        rows = Dataset.from_list([{"prompt": question("a"), "image": image}]).cast_column("image", Image())
        row = collate(list(rows), "rows")
        return fingerprint.of_data({"data": rows}) | fingerprint.of_prompts(row, 1)

    same, again = (facts(str(path), picture(0)) for _ in range(2))
    other = facts(str(path), picture(1))
    assert same == again
    assert all(same[key] != other[key] for key in same)


# ---- what is refused ----


def test_a_tokenizer_sees_no_images(see):
    with pytest.raises(ValueError, match=r"`train_dataset` has the column 'image', but `processing_class` is a tok"):
        see(model=make_model(), processing_class=make_tokenizer())
    parts = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "a"}]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": parts}]}])
    with pytest.raises(ValueError, match="Prompt 0 has a part of type 'image', but `processing_class` is a tokenizer"):
        see(model=make_model(), processing_class=make_tokenizer(), dataset=rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_func": lambda prompts, trainer: {}}, "`rollout_func` makes"),
        ({"agent_func": lambda example, endpoint: 0.0}, "programs ask for completions of texts"),
    ],
)
def test_what_cannot_be_combined(trainer, options, message):
    with pytest.raises(ValueError, match=f"`train_dataset` has the column 'image', but {message}"):
        trainer("no/such-model", train_dataset=with_pictures(), processing_class=None, **options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "What is it?", "image": picture(0)}, "Row 0 of `train_dataset`: a row has images, but its prompt"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "image": picture(0)},
            r"Row 0 of `train_dataset`: Number of images provided \(1\) does not match",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            "Prompt 0 has a part of type 'image' with",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]},
            "Prompt 0 has a part of type 'video', but video and audio are not supported",
        ),
        ({"prompt": question("a"), "videos": ["a"]}, "has the column 'videos', but video and audio are not supported"),
        ({"prompt": question("a" * 245), "image": picture(0)}, "Prompt 0 has 258 tokens, with those of its images"),
    ],
)
def test_bad_rows(see, row, message):
    with pytest.raises(ValueError, match=message):
        see(dataset=Dataset.from_list([row]))
