"""Rollouts of models that read images, in prompts and in what tools return."""

from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from calling import PROMPTS, calling_model, calling_tokenizer, needs_tools, trained_weights
from conftest import letters
from datasets import Dataset
from looking import ENDS, MOST, call_always, look, make_looking
from PIL import Image
from tiny_vision import FAMILIES, picture, question
from transformers import GenerationConfig

from es_trainer.agents import Conversation, ToolTemplate
from es_trainer.backends import Prompts
from es_trainer.engines.image_prompts import joined
from es_trainer.images import images_of
from es_trainer.rollout import Completion


pytestmark = needs_tools


@pytest.fixture
def calls(monkeypatch):
    call_always(monkeypatch)


@pytest.fixture
def looking(trainer, calls):
    """Make a trainer of a tiny model that looks at a picture after every answer."""

    def make(family: str = "gemma3", **options):
        model, processor = make_looking(family)
        data = Dataset.from_list([{"prompt": question(f"What is {i}?"), "image": picture(i)} for i in range(2)])
        given = {"model": model, "processing_class": processor, "tools": [look], "max_tool_calling_iterations": 1}
        given |= {"train_dataset": data, "eval_dataset": data, "max_completion_length": MOST, **options}
        return trainer(generation_kwargs={"eos_token_id": ENDS}, **given)

    return make


def own_answer(family: str, ids: list[int], images: list[Image.Image]) -> list[int]:
    """What the model's own `generate` says after tokens with these images."""
    model, processor = make_looking(family)
    nested = [images] if family == "idefics3" else images
    fields = dict(processor.image_processor(images=nested, return_tensors="pt"))
    if family == "llava_next":
        fields["image_sizes"] = torch.as_tensor(fields["image_sizes"])
    fields.pop("rows", None), fields.pop("cols", None), fields.pop("num_crops", None)
    kinds = (torch.tensor([ids]) == model.config.image_token_id).long()
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in processor.model_input_names:
            fields[name] = kinds
    config = GenerationConfig(max_new_tokens=MOST, eos_token_id=ENDS, pad_token_id=0, do_sample=False)
    tokens = torch.tensor([ids])
    output = model.generate(input_ids=tokens, attention_mask=tokens >= 0, **fields, generation_config=config)
    return output[0, len(ids) :].tolist()


def rolled_out(run, rows: list[dict]) -> list[tuple[list[int], Completion]]:
    """Tokens of prompts, and completions of all turns."""
    answers = run.backend.answers
    with run.backend.in_working_dtype():
        ids = answers.tokenize(run.engine, rows)
        completions, _, _ = answers.complete(
            run.engine, [Prompts(rows, ids, 1, seed=0)], range(len(rows)), ["policy"], None, None
        )
    return list(zip(ids, completions, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_sees_the_images_of_the_turns_before(looking, family):
    """The second answer is what the model's own `generate` says after all tokens, with all images."""
    run = looking(family)
    with_image = {"prompt": [{"role": "user", "content": [{"type": "image", "image": picture(7)}]}]}
    without = {"prompt": question("What is it?")}
    for prompt, completion in rolled_out(run, [with_image, without, with_image]):
        assert [message["role"] for message in completion.messages] == ["assistant", "tool", "assistant"]
        images = images_of(completion.messages)
        assert len(images) == 1
        first = completion.ids[: next(n for n, token in enumerate(completion.ids, 1) if token in ENDS)]
        second = completion.ids[len(first) + completion.others :]
        before = [*prompt, *completion.ids[: len(first) + completion.others]]
        own = [picture(7)] if prompt.images else []
        assert second == own_answer(family, before, own + images)
        assert first == (own_answer(family, list(prompt), own) if own else first)


def test_numbers_of_tokens_are_those_of_the_same_tokens(looking):
    """In a batch with padding, and with answers between what the template wrote."""
    run = looking("gemma3")
    template = run.backend.answers._template(run.engine, None)
    start = template.encode([{"role": "user", "content": [{"type": "image", "image": picture(7)}]}])
    result = template.encode_results([{"role": "tool", "name": "look", "content": look(3)}])
    prompts = [joined([start, [5, 6, 7], result]), joined([start]), joined([start, [8], result, [9, 5], result])]
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    fields = run.engine.images.inputs(prompts)
    assert torch.equal(fields["token_type_ids"], (padded == run.model.config.image_token_id).long())
    assert fields["token_type_ids"].sum(1).tolist() == [8, 4, 12]  # of images of 4 tokens each


def test_results_are_written_as_in_the_whole_conversation(looking):
    """An answer and a result have the tokens that the template writes for the conversation at once."""
    run = looking("qwen2_5_vl")
    template = run.backend.answers._template(run.engine, None)
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    before = [*question("What is it?"), {"role": "assistant", "content": "a", "tool_calls": [call]}]
    result = {"role": "tool", "name": "look", "content": look(3)}
    whole = template._encode([*before, result], add_generation_prompt=True)
    results = template.encode_results([result])
    assert whole[-len(results) :] == list(results)
    (written,) = results.written
    assert written.text.startswith("\n<s>tool:Picture 3: <|vision_start|>")
    assert written.text.endswith(" and that is all.</s>\n<s>assistant:")
    assert results.count(run.processing_class.image_token_id) == 8  # 32 x 64 pixels, of 16 x 16 each


@pytest.mark.parametrize("mode", [{"population_batch_size": 1}, {"perturbation": "low_rank"}])
def test_a_run(looking, mode):
    seen = []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return letters([[{"content": "a" * len(images_of(completion))}] for completion in completions])

    run = looking(reward_funcs=reward, max_steps=1, log_completions=True, log_multimodal=True, **mode)
    run.train()
    assert len(seen) >= 4 * 2
    for completion in seen:
        (image,) = images_of(completion)
        assert image.size == (64, 32)
    (logged,) = Path(run.args.output_dir, "completions").glob("*.parquet")
    table = pyarrow.parquet.read_table(logged).to_pydict()
    assert [len(images) for images in table["images"]] == [2, 2]  # of the prompt, and of the tool


def test_an_answer_with_the_token_of_images_ends_a_conversation(looking):
    run = looking("qwen2_5_vl")
    template = run.backend.answers._template(run.engine, None)
    conversation = Conversation(template.encode(question("What is it?")), template, most=100)
    conversation.add_answer(Completion([5, 6], "ab", False))
    assert conversation.pending
    conversation.add_answer(Completion([5, run.model.config.image_token_id], "a", False))
    assert not conversation.pending


def test_an_image_for_a_model_that_reads_texts(trainer):
    def add(a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        return look(a + b)

    data = Dataset.from_dict({"prompt": PROMPTS})
    _, length = trained_weights()
    run = trainer(
        calling_model(),
        tools=[add],
        processing_class=calling_tokenizer(),
        train_dataset=data,
        eval_dataset=data,
        max_completion_length=length + 8,
        sigma=1e-4,
    )
    with pytest.raises(ValueError, match="The tool `add` returned an image, but `processing_class` is a tokenizer"):
        run.train()


def test_parts_of_texts_for_a_model_that_reads_texts():
    template = ToolTemplate(calling_tokenizer(), None, [], {})
    result = {"role": "tool", "name": "add", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]}
    assert template.encode_results([result]) == template.encode_results([{**result, "content": "42"}])
