"""Tools, environments and programs with vLLM in the trainer's process: in place, and members as adapters."""

import sys
from pathlib import Path

import openai
import pytest
import tiny
from conftest import logs, make_tokenizer
from datasets import Dataset


sys.path.append(str(Path(__file__).parents[1] / "agents"))

from calling import PROMPTS, QUESTIONS, add, calling_model, calling_tokenizer, conversation, trained_weights


MODES = {"in place": {}, "adapters": {"vllm_lora": True, "perturbation": "low_rank", "population_batch_size": 3}}
ROWS = Dataset.from_dict({"number": list(range(4))})


@pytest.fixture(scope="module")
def calling_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("calling")
    calling_model().save_pretrained(folder)
    calling_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("mode", MODES)
def test_members_call_tools(trainer, calling_folder, mode):
    seen = []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return [float(completion[-1]["content"] == "It is 5.") for completion in completions]

    _, length = trained_weights()
    data = Dataset.from_dict({"prompt": PROMPTS})
    run = trainer(
        model=calling_folder,
        processing_class=calling_tokenizer(),
        train_dataset=data,
        eval_dataset=None,
        tools=[add],
        reward_funcs=reward,
        use_vllm=True,
        max_steps=1,
        sigma=1e-4,
        max_completion_length=length + 8,
        **MODES[mode],
    )
    run.train()
    expected = [[message.get("content", "") for message in conversation(question)[1:]] for question in QUESTIONS]
    assert len(seen) == 8
    assert all([message["content"] for message in completion] in expected for completion in seen)
    (log,) = logs(run)
    assert log["tools/call_frequency"] == 1.0 and log["reward"] == 0.5


@pytest.mark.parametrize("mode", MODES)
def test_programs_are_answered_as_without_vllm(trainer, mode):
    def once(**options):
        said = {}

        def program(example, endpoint):
            with openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0) as client:
                messages = [{"role": "user", "content": f"Number {example['number']}"}]
                for _ in range(2):
                    reply = client.chat.completions.create(model=endpoint.model, messages=messages)
                    answer = reply.choices[0].message.content
                    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And?"}]
                streamed = client.chat.completions.create(model=endpoint.model, messages=messages[:1], stream=True)
                first = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
                assert first == messages[1]["content"]
                if len(first) > 3:
                    cut = client.chat.completions.create(model=endpoint.model, messages=messages[:1], stop=first[2:4])
                    assert cut.choices[0].message.content == first[: first.index(first[2:4])]
            said[endpoint.model, example["number"]] = [message["content"] for message in messages]
            return float(len(answer))

        run = trainer(
            model=tiny.tiny_folder(),
            processing_class=make_tokenizer(),
            train_dataset=ROWS,
            eval_dataset=None,
            agent_func=program,
            reward_funcs=None,
            max_steps=1,
            sigma=0.05,
            **options,
        )
        run.train()
        return said

    plain = {name: value for name, value in MODES[mode].items() if name != "vllm_lora"}
    mine, theirs = once(use_vllm=True, **MODES[mode]), once(**plain)
    assert mine.keys() == theirs.keys() and len(mine) >= 8
    if mode == "in place":  # adapters leave some parameters as they are
        assert mine == theirs
    assert len({tuple(said) for said in mine.values()}) > 4
