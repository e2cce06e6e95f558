"""Programs that ask members for completions, by real clients."""

import asyncio
import gc
import json
import socket
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pyarrow.parquet
import pytest
import torch
from calling import add, calling_model, calling_tokenizer, needs_tools, trained_weights
from datasets import Dataset, IterableDataset
from transformers.utils import get_json_schema

from es_trainer.config import ESConfig


ROWS = Dataset.from_dict({"number": list(range(4))})
LOW_RANK = {"perturbation": "low_rank"}


def client(endpoint, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0, **options)


def ask(endpoint, content: str, **options) -> str:
    with client(endpoint) as opened:
        messages = [{"role": "user", "content": content}]
        return (
            opened.chat.completions.create(model=endpoint.model, messages=messages, **options)
            .choices[0]
            .message.content
        )


def lengths(example, endpoint) -> float:
    return len(ask(endpoint, f"Number {example['number']}")) + example["number"]


@pytest.fixture
def agent(trainer):
    """Make a trainer of programs."""
    servers = []

    def make(agent_func, **options):
        given = {"agent_func": agent_func, "reward_funcs": None, "train_dataset": ROWS, "eval_dataset": None}
        made = trainer(**given | {"max_steps": 1, "max_completion_length": 8} | options)
        servers.append(made.backend.answers._server)
        return made

    yield make
    for server in servers:
        server.stop()


def logged(run) -> dict:
    return [log for log in run.state.log_history if "reward" in log][-1]


@pytest.mark.parametrize("options", [{"population_batch_size": 1}, LOW_RANK], ids=["one at a time", "low rank"])
def test_every_member_answers_its_own_programs(agent, options):
    """30 members with 8 programs each, all at once where members are evaluated together."""
    seen = {}

    def program(example, endpoint):
        with client(endpoint) as opened:
            messages = [{"role": "user", "content": f"Number {example['number']}"}]
            for turn in range(2):
                reply = opened.chat.completions.create(model=endpoint.model, messages=messages).choices[0].message
                assert seen.setdefault((endpoint.model, example["number"], turn), reply.content) == reply.content
                messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": "And?"}]
        return float(len(reply.content))

    rows = Dataset.from_dict({"number": list(range(8))})
    more = {"population_size": 30, "num_prompts_per_step": 8, "agent_concurrency": 240, "sigma": 0.1}
    run = agent(program, train_dataset=rows, **more, **options)
    population = None

    def remember(function):
        def ask():
            nonlocal population
            population = function()
            return population

        return ask

    run.optimizer.ask = remember(run.optimizer.ask)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    run.train()
    assert len(seen) == 30 * 8 * 2 and logged(run)["agent/calls"] == pytest.approx(2.0)

    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            parameter.copy_(before[name])
    with run.backend.in_working_dtype():
        for number in (0, 7, 29):
            run.optimizer.perturb(population.members[number])
            ids = run.engine.tokenize([[{"role": "user", "content": f"Number {row}"}] for row in range(8)])
            expected = [completion.text for completion in run.engine.generate(ids, seed=0)]
            assert [seen[f"member-{number}", row, 0] for row in range(8)] == expected
            run.optimizer.restore()


def test_a_program_without_a_client_of_its_own(agent):
    """The form of what goes over the wire, by a plain HTTP client."""
    forms = []

    def program(example, endpoint):
        with httpx.Client(headers={"Authorization": f"Bearer {endpoint.api_key}"}) as http:
            models = http.get(f"{endpoint.base_url}/models").json()
            body = {"model": endpoint.model, "prompt": "Say", "max_tokens": 3}
            forms.append((models, http.post(f"{endpoint.base_url}/completions", json=body).json()))
            for tokens in ([5, 10**6], [-1], []):  # which would end training
                reply = http.post(f"{endpoint.base_url}/completions", json=body | {"prompt": tokens})
                assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
        return 1.0 + example["number"]

    agent(program, **LOW_RANK).train()
    models, text = forms[0]
    assert [model["id"] for model in models["data"]] == [text["model"]] and text["model"].startswith("member-")
    assert text["object"] == "text_completion" and text["choices"][0]["finish_reason"] == "length"
    assert text["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


def test_streams_say_what_whole_answers_do(agent):
    found = []

    def program(example, endpoint):
        messages = [{"role": "user", "content": f"Number {example['number']}"}]
        with client(endpoint) as opened:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            chunks = list(opened.chat.completions.create(model=endpoint.model, messages=messages, **options))
            texts = opened.completions.create(model=endpoint.model, prompt="Say", stream=True)
            text = "".join(chunk.choices[0].text for chunk in texts)
            whole = opened.completions.create(model=endpoint.model, prompt="Say").choices[0].text
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        found.append(
            (pieces, ask(endpoint, f"Number {example['number']}"), text, whole, chunks[-1].usage.completion_tokens)
        )
        return float(example["number"])

    agent(program, **LOW_RANK).train()
    assert all("".join(pieces) == answer and text == whole for pieces, answer, text, whole, _ in found)
    assert any(len(pieces) > 3 for pieces, *_ in found) and all(1 <= tokens <= 8 for *_, tokens in found)


def test_async_programs(agent):
    together = 0
    most = 0

    async def program(example, endpoint):
        nonlocal together, most
        together += 1
        most = max(most, together)
        async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key) as opened:
            call = opened.chat.completions.create(
                model=endpoint.model, messages=[{"role": "user", "content": "Hi"}], max_tokens=4
            )
            await call
        await asyncio.sleep(0.05)
        together -= 1
        return example["number"]

    run = agent(program, agent_concurrency=3, num_prompts_per_step=4, **LOW_RANK)
    run.train()
    assert most == 3 and logged(run)["rewards/program/mean"] == 1.5


@needs_tools
def test_tools_are_called_by_openais_names(agent):
    _, length = trained_weights()
    replies = []

    def program(example, endpoint):
        messages = [{"role": "user", "content": "two and three?"}]
        with client(endpoint) as opened:
            options = {"model": endpoint.model, "tools": [get_json_schema(add)], "max_tokens": length}
            first = opened.chat.completions.create(messages=messages, **options)
            (call,) = first.choices[0].message.tool_calls
            result = add(**json.loads(call.function.arguments))
            messages += [
                first.choices[0].message.model_dump(exclude_none=True),
                {"role": "tool", "tool_call_id": call.id, "content": str(result)},
            ]
            chunks = list(opened.chat.completions.create(messages=messages, stream=True, **options))
        replies.append((first.choices[0].finish_reason, "".join(c.choices[0].delta.content or "" for c in chunks)))
        return 1.0

    agent(program, model=calling_model(), processing_class=calling_tokenizer(), sigma=1e-4).train()
    assert set(replies) == {("tool_calls", "It is 5.")}


def test_what_a_request_may_say(agent):
    texts = {}

    def program(example, endpoint):
        if endpoint.model == "member-0":
            whole = ask(endpoint, "Hi")
            texts["stop"] = (whole, ask(endpoint, "Hi", stop=[whole[3:5]]))
            texts["parts"] = (whole, ask(endpoint, [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]))
            sampled = [ask(endpoint, "Hi", temperature=1.0, seed=seed) for seed in (1, 1, 2)]
            texts["seed"] = sampled
        return lengths(example, endpoint)

    agent(program, population_batch_size=1).train()
    whole, stopped = texts["stop"]
    assert stopped == whole[: whole.index(whole[3:5])]
    assert texts["parts"][0] == texts["parts"][1]
    assert texts["seed"][0] == texts["seed"][1] != texts["seed"][2]


@pytest.mark.parametrize("options", [{"population_batch_size": 1}, LOW_RANK], ids=["one at a time", "low rank"])
def test_sampling_has_common_random_numbers_and_can_be_repeated(agent, options):
    def once():
        said = {}

        def program(example, endpoint):
            answers = [ask(endpoint, f"Number {example['number']}") for _ in range(2)]
            said[endpoint.model, example["number"]] = answers
            return float(sum(map(len, answers)))

        # A noise that changes nothing shows the random numbers alone
        agent(program, temperature=1.0, sigma=1e-9, bf16=False, **options).train()
        return said

    first, second = once(), once()
    assert first == second
    for number in {number for _, number in first}:
        answers = [said for (_, of), said in first.items() if of == number]
        assert all(said == answers[0] for said in answers) and answers[0][0] != answers[0][1]
    assert len({tuple(said) for said in first.values()}) == len({number for _, number in first})


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "member-99"}, 404, "This program's model is 'member-"),
        ({"api_key": "wrong"}, 401, "use `endpoint.api_key`"),
        ({"max_tokens": 1000}, 400, "tokens and the answer up to 1000, but the model reads at most 256"),
        ({"content": "x" * 300}, 400, "but the model reads at most 256"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, 400, "the type 'image_url'"),
        ({"n": 2}, 400, "`n=2` is not supported: leave it out"),
        ({"temperature": -1}, 400, "`temperature`"),
        pytest.param({"tools": [get_json_schema(add)]}, 400, "chat template", marks=needs_tools),
    ],
)
def test_requests_that_cannot_be_answered(agent, change, status, said):
    errors = []

    def program(example, endpoint):
        key = change.get("api_key", endpoint.api_key)
        options = {"model": endpoint.model} | {k: v for k, v in change.items() if k not in ("api_key", "content")}
        with openai.OpenAI(base_url=endpoint.base_url, api_key=key, max_retries=0) as opened:
            try:
                messages = [{"role": "user", "content": change.get("content", "Hi")}]
                opened.chat.completions.create(messages=messages, **options)
            except openai.APIStatusError as error:
                errors.append((error.status_code, error.body["message"]))
        return lengths(example, endpoint)

    agent(program, **LOW_RANK).train()
    assert len(errors) == 2 * 4 and {code for code, _ in errors} == {status}
    assert all(said in message for _, message in errors)


# ---- what goes wrong ----


def test_a_program_that_raises_ends_training_with_clean_weights(agent):
    def broken(example, endpoint):
        ask(endpoint, "Hi")
        raise ArithmeticError("out of order")

    run = agent(broken, population_batch_size=1)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    with pytest.raises(RuntimeError, match="`agent_func` 'broken' failed for member-0: ArithmeticError: out of order"):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_programs_that_raise_may_not_count(agent):
    def broken(example, endpoint):
        ask(endpoint, "Hi")
        if endpoint.model == "member-1" or example["number"] == 3:
            raise SystemExit("out of order")
        return 1.0 + example["number"]

    run = agent(broken, agent_errors="none", num_prompts_per_step=4, **LOW_RANK)
    run.train()
    # One member of four, and a row of the others
    assert logged(run)["agent/failure_frequency"] == (4 + 3) / 16
    assert logged(run)["rewards/broken/mean"] == 2.0


def test_a_program_that_never_asks_the_model(agent):
    with pytest.raises(RuntimeError, match="returned without having asked the model for anything. Point its client"):
        agent(lambda example, endpoint: 1.0).train()


def test_a_dict_without_a_reward(agent):
    def program(example, endpoint):
        ask(endpoint, "Hi")
        return {"score": 1.0}

    with pytest.raises(RuntimeError, match="'program' raised TypeError: a program returned a dict with 'score'"):
        agent(program).train()


@pytest.mark.parametrize("kind", ["waits for the model", "computes", "async"])
def test_programs_past_their_time_do_not_count(agent, kind):
    ended = []

    def computes(example, endpoint):
        answer = lengths(example, endpoint)
        try:
            while example["number"] == 0:
                time.sleep(0.01)
        finally:
            ended.append(example["number"])
        return answer

    def waits(example, endpoint):
        answer = lengths(example, endpoint)
        while example["number"] == 0:
            ask(endpoint, "And?")
        return answer

    async def sleeps(example, endpoint):
        answer = await asyncio.to_thread(lengths, example, endpoint)
        if example["number"] == 0:
            await asyncio.sleep(60)
        return answer

    program = {"waits for the model": waits, "computes": computes, "async": sleeps}[kind]
    run = agent(program, agent_timeout=2.0, num_prompts_per_step=4, population_size=2, **LOW_RANK)
    threads = threading.active_count()
    started = time.monotonic()
    run.train()
    assert time.monotonic() - started < 20
    assert logged(run)["agent/failure_frequency"] == 0.25
    assert ended.count(0) == (2 if kind == "computes" else 0)
    assert threading.active_count() <= threads


def is_running(pid: str) -> bool:
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE  # which nobody has waited for
    except psutil.NoSuchProcess:
        return False


def test_subprocesses_get_the_endpoint_and_are_killed_with_their_children(agent, tmp_path):
    script = tmp_path / "agent.py"
    script.write_text(
        "import os, json, urllib.request\n"
        "body = {'model': os.environ['OPENAI_MODEL'], 'messages': [{'role': 'user', 'content': 'Hi'}]}\n"
        "headers = {'Authorization': 'Bearer ' + os.environ['OPENAI_API_KEY'], 'Content-Type': 'application/json'}\n"
        "url = os.environ['OPENAI_BASE_URL'] + '/chat/completions'\n"
        "request = urllib.request.Request(url, json.dumps(body).encode(), headers)\n"
        "print(json.load(urllib.request.urlopen(request))['choices'][0]['message']['content'])\n"
    )
    answers, children = {}, tmp_path / "children"

    def program(example, endpoint):
        done = endpoint.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
        answers[endpoint.model] = (done.stdout.removesuffix("\n"), ask(endpoint, "Hi"))
        if endpoint.model == "member-0":
            # A shell whose child would stay if the shell alone was killed
            endpoint.run(["bash", "-c", f"sleep 600 & echo $! >> {children}; wait"])
        return float(len(done.stdout))

    run = agent(program, agent_timeout=6.0, num_prompts_per_step=1, **LOW_RANK)
    run.train()
    assert len(answers) == 4 and all(by_script == by_client for by_script, by_client in answers.values())
    assert logged(run)["agent/failure_frequency"] == 0.25
    assert not any(map(is_running, children.read_text().split()))


def test_a_step_leaves_nothing_behind(agent):
    process = psutil.Process()
    run = agent(lengths, max_steps=4, **LOW_RANK)
    counts = []

    class Count(run.callback_handler.callbacks[0].__class__.__mro__[-2]):
        def on_step_end(self, args, state, control, **kwargs):
            time.sleep(0.2)  # connections that clients have closed
            sockets = len(process.net_connections("tcp"))
            counts.append((sockets, threading.active_count(), len(process.children(recursive=True))))

    run.add_callback(Count())
    run.train()
    assert len(counts) == 4 and len(set(counts[1:])) == 1


def test_a_trainer_that_is_gone_leaves_no_server(agent):
    run = agent(lengths, **LOW_RANK)
    run.train()
    port = int(run.backend.answers._server.base_url.split(":")[2].removesuffix("/v1"))
    del run
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        gc.collect()
        with socket.socket() as connecting:
            if connecting.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.1)
    raise AssertionError("the server still listens")


def test_a_failing_engine_fails_programs_and_training(agent):
    errors = []

    def program(example, endpoint):
        ask(endpoint, "Hi")
        broken.set()
        try:
            ask(endpoint, "And?")
        except openai.APIStatusError as error:
            errors.append(error.body["message"])
        return 1.0

    run = agent(program, population_batch_size=1)
    broken = threading.Event()

    def lose(*args):
        if broken.is_set():
            raise OSError("the device is lost")

    run.model.register_forward_pre_hook(lose)
    with pytest.raises(OSError, match="the device is lost"):
        run.train()
    assert errors and set(errors) == {"The trainer failed: OSError: the device is lost"}


# ---- data, rewards, logs, evaluation ----


def test_reward_functions_beside_the_program(agent):
    seen = []

    def program(example, endpoint):
        ask(endpoint, f"Number {example['number']}")
        answer = ask(endpoint, "And?")
        assert "prompt" not in example
        return {"reward": {"solved": 1.0, "length": len(answer) / 8}, "answer": answer}

    def brief(completions, prompts, agent_result, agent_calls, number, **kwargs):
        seen.extend(zip(completions, prompts, agent_result, agent_calls, number, strict=True))
        return [-1.0] * len(completions)

    run = agent(program, reward_funcs=brief, log_completions=True, **LOW_RANK)
    run.train()
    log = logged(run)
    assert log["agent/solved"] == 1.0 and 0 < log["agent/length"] <= 1.0
    assert log["rewards/program/mean"] == pytest.approx(log["agent/solved"] + log["agent/length"])
    assert log["reward"] == pytest.approx(log["rewards/program/mean"] - 1.0)
    for completion, prompt, result, calls, number in seen:
        assert completion == [{"role": "assistant", "content": result["answer"]}]
        assert prompt == [{"role": "user", "content": "And?"}]
        assert [call["messages"][0]["content"] for call in calls] == [f"Number {number}", "And?"]
        assert all(call["seconds"] > 0 and call["usage"]["completion_tokens"] <= 8 for call in calls)
    (file,) = Path(run.args.output_dir).rglob("completions_*.parquet")
    rows = pyarrow.parquet.read_table(file).to_pylist()
    assert len(rows) == 2
    for row in rows:
        calls = json.loads(row["calls"])
        assert row["error"] is None and calls[-1]["reply"]["content"] == row["answer"] and len(calls) == 2


def test_streams_and_prompts_of_the_data(agent):
    prompts = []

    def program(example, endpoint):
        prompts.append(example["prompt"])
        ask(endpoint, "Hi")
        return float(len(prompts))

    rows = IterableDataset.from_generator(lambda: iter([{"prompt": "one"}, {"prompt": "two"}] * 4))
    agent(program, train_dataset=rows, **LOW_RANK).train()
    assert set(prompts) == {"one", "two"}


def test_evaluation_asks_the_policy(agent):
    models = []

    def program(example, endpoint):
        models.append(endpoint.model)
        return lengths(example, endpoint)

    run = agent(program, eval_dataset={"held_out": ROWS}, **LOW_RANK)
    metrics = run.evaluate()
    assert metrics["eval_held_out_reward"] == metrics["eval_held_out_rewards/program/mean"]
    assert run.evaluate(ROWS)["eval_reward"] == metrics["eval_held_out_reward"]
    assert models == ["policy"] * 8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"agent_func": "solve"}, TypeError, "`agent_func='solve'` is no function"),
        ({"tools": [add]}, ValueError, "`agent_func` with `rollout_func`, `tools` or `environment_factory`"),
        ({"agent_timeout": 0.0}, ValueError, "`agent_timeout=0.0` is not valid"),
        ({"agent_errors": "ignore"}, ValueError, "`agent_errors='ignore'` is not valid: choose one of"),
        ({"agent_concurrency": 0}, ValueError, "`agent_concurrency=0` is not valid"),
    ],
)
def test_what_cannot_work(agent, options, error, message):
    with pytest.raises(error, match=message):
        agent(**{"agent_func": lengths} | options)


def test_a_port_that_is_taken(agent):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"`agent_port={port}` cannot be listened on"):
            agent(lengths, agent_port=port)


def test_the_config_alone_needs_no_server():
    assert ESConfig("x", agent_port=8000, agent_errors="none").agent_timeout is None
