"""Code of the user on vLLM servers: programs, rollout functions and tools talk to members wherever these are."""

import threading

import openai
import pytest
import test_agents
import tiny
from conftest import logs, make_tokenizer
from datasets import Dataset
from test_servers import Process, running


@pytest.fixture(scope="module")
def servers():
    with running(Process(), Process()) as started:
        yield started


@pytest.fixture
def start(trainer):
    """Make a trainer of one step, on servers or by Transformers."""

    def make(*servers, **options):
        mode = {}
        if servers:
            mode = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": [each.url for each in servers]}
        given = {"model": tiny.tiny_folder(), "processing_class": make_tokenizer(), "eval_dataset": None}
        return trainer(**given | mode | {"max_steps": 1, "sigma": 0.05} | options)

    return make


def remembering(said, before=lambda endpoint: None):
    def program(example, endpoint):
        before(endpoint)
        with openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0) as client:
            messages = [{"role": "user", "content": f"Number {example['number']}"}]
            for _ in range(2):
                reply = client.chat.completions.create(model=endpoint.model, messages=messages)
                messages += [
                    {"role": "assistant", "content": reply.choices[0].message.content},
                    {"role": "user", "content": "And?"},
                ]
        said[endpoint.model, example["number"]] = [message["content"] for message in messages]
        return float(len(messages[-2]["content"]))

    return program


def test_programs_get_the_answers_of_their_members(servers, start):
    mine, theirs = {}, {}
    options = {"train_dataset": test_agents.ROWS, "reward_funcs": None}
    run = start(*servers, agent_func=remembering(mine), **options)
    run.train()
    start(agent_func=remembering(theirs), **options).train()
    assert mine == theirs and len(mine) >= 8 and len({tuple(said) for said in mine.values()}) > 4
    run.evaluate(test_agents.ROWS)
    assert {number for model, number in mine if model == "policy"} == {0, 1, 2, 3}


def test_rollout_functions_generate_with_their_members(servers, start):
    seen = {}

    def rollout(prompts, trainer):
        made = trainer.generate(prompts)
        more = trainer.generate([prompt + entry["text"] for prompt, entry in zip(prompts, made, strict=True)])
        seen.setdefault(trainer.args.use_vllm, []).append([entry["text"] for entry in more])
        return {key: [entry[key] for entry in more] for key in ("prompt_ids", "completion_ids")}

    logged = []
    for where in (servers, ()):
        run = start(*where, rollout_func=rollout, temperature=0.0)
        run.train()
        logged.append(logs(run)[0]["reward"])
    assert sorted(seen[True]) == sorted(seen[False]) and logged[0] == logged[1]


def test_programs_start_again_on_another_server(servers, start):
    said, begun, lost = {}, [], threading.Event()

    def lose(endpoint):
        begun.append(endpoint.model)
        if len(set(begun)) > 1 and not lost.is_set():  # both servers have begun
            lost.set()
            servers[1].kill()

    options = {"train_dataset": test_agents.ROWS, "reward_funcs": None, "population_size": 6}
    run = start(*servers, agent_func=remembering(said, lose), vllm_server_timeout=20.0, **options)
    try:
        run.train()
    finally:
        servers[1].start()
        servers[1].wait()
    expected = {}
    start(agent_func=remembering(expected), **options).train()
    assert said == expected and len(begun) > len(said)


def test_tools_and_environments(start, tmp_path):
    from calling import PROMPTS, Sums, add, calling_model, calling_tokenizer, trained_weights

    calling_model().save_pretrained(tmp_path)
    calling_tokenizer().save_pretrained(tmp_path)

    _, length = trained_weights()
    given = {"model": str(tmp_path), "processing_class": calling_tokenizer(), "sigma": 1e-4}
    given |= {"train_dataset": Dataset.from_dict({"prompt": PROMPTS}), "max_completion_length": length + 8}
    server = Process("--max-model-len", "2048", model=str(tmp_path))
    try:
        server.wait()
        run = start(server, tools=[add], **given)
        run.train()
        assert logs(run)[0]["tools/call_frequency"] == 1.0
        run = start(server, environment_factory=Sums, reward_funcs=None, **given)
        run.train()
        assert logs(run)[0]["reward"] == 3.5
    finally:
        server.kill()
