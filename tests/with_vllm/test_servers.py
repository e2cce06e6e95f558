"""Training with vLLM servers: real ones, which are killed, stopped and started anew."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import tiny
import torch
from conftest import assert_same, letters, logs, make_model, weights
from datasets import Dataset
from safetensors.torch import load_file
from test_distributed import free_port
from watched import Watched

from es_trainer import replay
from es_trainer.engines.vllm_client import Cancelled, ServerError
from es_trainer.engines.vllm_members import COMPLETIONS
from es_trainer.engines.vllm_weights import LoadError
from es_trainer.evolution import Population


STARTING = 120  # seconds


class Process:
    """A server, in a process group of its own."""

    def __init__(self, *options: str, token: str | None = None, model: str | None = None):
        self.model = model or tiny.tiny_folder()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.options = options
        self.token = token
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"VLLM_API_KEY": self.token} if self.token else {})}
        command = [sys.executable, "-m", "es_trainer.cli", "vllm-serve", "--model", self.model]
        command += ["--dtype", "float32", "--max-model-len", "256", "--port", str(self.port), *self.options]
        environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def wait(self) -> None:
        for _ in range(STARTING):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").is_success:
                    return
            assert self.process.poll() is None
            time.sleep(1)
        raise TimeoutError(self.url)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def running(*servers: Process) -> Iterator[list[Process]]:
    """Inside, the servers are up; afterwards they are killed."""
    try:
        for server in servers:
            server.wait()
        yield list(servers)
    finally:
        for server in servers:
            server.kill()


@pytest.fixture(scope="module")
def servers():
    with running(Process(), Process()) as started:
        yield started


@pytest.fixture
def start(trainer):
    """Make an ESTrainer for a tiny run on servers."""

    def make(*servers, **options):
        urls = [server.url for server in servers]
        made = trainer(
            **{
                "model": tiny.tiny_folder(),
                "use_vllm": True,
                "vllm_mode": "server",
                "vllm_server_base_url": urls,
                "vllm_server_timeout": 60.0,
                **options,
            }
        )
        made.delay = 0.0  # seconds that completions take longer
        made.answered = {url: [] for url in urls}  # the steps in which each server completed prompts
        for server in made.engine.replicas.servers:
            count(server, made)
        return made

    return make


def count(server, trainer) -> None:
    complete = server.complete

    def counted(*args):
        completions = complete(*args)
        time.sleep(trainer.delay)
        trainer.answered[server.url].append(trainer.state.global_step + 1)
        return completions

    server.complete = counted


@pytest.fixture
def plain(trainer):
    """A run with Transformers, and the weights that it ended with."""

    def run(**options):
        made = trainer(tiny.tiny_folder(), **options)
        made.train()
        return made

    return run


def assert_alike(mine, theirs, folder) -> None:
    for one, other in zip(logs(mine), logs(theirs), strict=True):
        for key in ("reward", "reward_std", "update_norm", "distance_from_start"):
            assert one[key] == pytest.approx(other[key], rel=1e-6), key
    mine.save_model(str(folder))
    saved = load_file(folder / "model.safetensors")
    assert_same(saved, weights(theirs.model))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_servers_share_out_members(servers, start, plain, tmp_path):
    # More than the 128 tokens whose keys and values vLLM caches together
    prompts = Dataset.from_list([{"prompt": f"Say {word} " * 20} for word in ("one", "two", "three")])
    options = {"population_size": 8, "eval_strategy": "steps", "eval_steps": 3, "train_dataset": prompts}
    mine, theirs = start(*servers, **options), plain(**options)
    mine.train()
    assert all(mine.answered.values())  # if not in each step: one that is slow may be helped with all that it has
    assert_alike(mine, theirs, tmp_path / "saved")
    evaluations = [[log["eval_reward"] for log in t.state.log_history if "eval_reward" in log] for t in (mine, theirs)]
    assert evaluations[0] == evaluations[1]
    assert all(log["generation_seconds"] + log["noise_seconds"] < log["step_time"] for log in logs(mine))
    assert_same(weights(replay(tiny.tiny_folder(), mine.args.output_dir)), weights(theirs.model))
    assert all(parameter.is_meta for parameter in mine.model.parameters())


@pytest.mark.parametrize("antithetic", [True, False])
def test_members_answer_prompts_of_their_own(servers, start, plain, tmp_path, antithetic):
    options = {"unique_prompts": True, "antithetic": antithetic, "evaluate_center": True, "population_size": 6}
    options |= {"num_prompts_per_step": 1, "shuffle_dataset": False}
    mine, theirs = start(*servers, **options), plain(**options)
    mine.train()
    assert_alike(mine, theirs, tmp_path / "saved")
    for key in ("num_tokens", "reward/center", "sigma_cost", "frac_reward_zero_std"):
        assert [log.get(key) for log in logs(mine)] == [log.get(key) for log in logs(theirs)], key


def test_a_resumed_run_is_replayed(servers, start, plain, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "es_optimizer": "adam"}
    whole, theirs = start(servers[0], **options), plain(**options)
    whole.train()
    resumed = start(*servers, **options, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert_alike(resumed, theirs, tmp_path / "saved")
    assert len(resumed.engine.replicas.update_records) == 3


def test_servers_that_do_not_get_where_the_checkpoint_was(servers, start, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    start(servers[0], **options).train()
    state = tmp_path / "run" / "checkpoint-2" / "optimizer" / "state.json"
    saved = json.loads(state.read_text())
    saved["checksum"][0][0] += 1
    state.write_text(json.dumps(saved))
    (state.parents[1] / "checksums.json").unlink()  # by which this would be passed over as damaged
    with pytest.raises(ServerError, match="has other weights than the checkpoint after 2 updates"):
        start(servers[0], **{**options, "max_steps": 3}).train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_loaded(servers, start, plain, tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_reward",
        "max_steps": 4,
        "learning_rate": 1.0,  # so large that it does not get better all the time
    }
    mine, theirs = start(servers[0], **options), plain(**options)
    mine.train()
    assert mine.state.best_global_step == theirs.state.best_global_step < 4
    assert_alike(mine, theirs, tmp_path / "saved")
    for run in (mine, theirs):
        run.args.load_best_model_at_end = False
        run.train()
    assert_alike(mine, theirs, tmp_path / "saved")
    assert_same(weights(replay(tiny.tiny_folder(), mine.args.output_dir)), weights(theirs.model))


def test_sampling(servers, start, tmp_path):
    options = {"temperature": 1.0, "num_generations": 2, "sigma": 1e-9, "max_steps": 1}
    one = start(servers[0], **options)
    one.train()
    two = start(*servers, **options)
    two.train()
    assert logs(one)[0]["reward"] == logs(two)[0]["reward"] > 0
    assert logs(two)[0]["reward_std"] == pytest.approx(0, abs=1e-12)  # the same random numbers for all members
    ids = one.engine.tokenize(list(one.train_dataset["prompt"]))
    assert [c.ids for c in one.engine.generate(ids, 5, 2)] == [c.ids for c in two.engine.generate(ids, 5, 2)]
    assert len({str(c.ids) for c in one.engine.generate(ids[:1] * 2, 5, 2)}) == 4


def test_a_server_that_is_killed_and_started_anew(servers, start, plain, tmp_path):
    first, second = servers

    def reward(completions, trainer_state, **kwargs):
        members = seen.setdefault(trainer_state.global_step + 1, [])
        members.append(completions)
        if len(members) == 1 and trainer_state.global_step == 1:
            second.kill()
        if len(members) == 1 and trainer_state.global_step == 3:
            second.start()
            second.wait()
            mine.delay = 0.5  # or the other would have done everything before this one has loaded the model
        return letters(completions)

    reward.__name__ = "letters"
    seen: dict[int, list] = {}
    options = {"population_size": 8, "max_steps": 6}
    mine, theirs = start(first, second, **options, reward_funcs=reward), plain(**options)
    mine.train()
    assert all(len(members) == 8 for members in seen.values())
    steps = mine.answered[second.url]
    assert {1, 6} <= set(steps) and 3 not in steps
    assert_alike(mine, theirs, tmp_path / "saved")
    positions = [server.call("checksum")[0] for server in mine.engine.replicas.servers]
    assert positions[0] == positions[1] and positions[0]["updates"] == 6


def stopped_in_step_2(server):
    def reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            server.signal(signal.SIGSTOP)
        return letters(completions)

    reward.__name__ = "letters"
    return reward


def test_a_server_that_hangs(servers, start, plain, tmp_path):
    """Others do its member, and no step waits for it."""
    first, second = servers
    options = {"population_size": 8, "max_steps": 4, "num_prompts_per_step": 4}
    theirs = plain(**options)
    mine = start(first, second, **options, reward_funcs=stopped_in_step_2(second), vllm_server_timeout=300.0)
    begin = time.monotonic()
    try:
        mine.train()
        assert time.monotonic() - begin < 200
        assert not {3, 4} & set(mine.answered[second.url])
        assert [server.late for server in mine.engine.replicas.servers] == [False, True]
        mine.save_model(str(tmp_path / "saved"))
    finally:
        second.signal(signal.SIGCONT)
    assert_alike(mine, theirs, tmp_path / "saved")
    assert [log["num_tokens"] for log in logs(mine)] == [log["num_tokens"] for log in logs(theirs)]
    assert mine.evaluate()["eval_reward"] == theirs.evaluate()["eval_reward"]
    for server in mine.engine.replicas.servers:
        with server.lock:  # which it has while it catches up, for as long as there are jobs
            (position,) = server.call("checksum")
        assert position["digest"] == mine.engine.replicas.digests[position["updates"]]


def test_a_server_that_hangs_with_a_member_that_must_not_be_repeated(servers, start, plain, tmp_path):
    first, second = servers
    options = {"population_size": 8, "max_steps": 4}
    theirs = plain(**options)
    mine = start(first, second, **options, reward_funcs=stopped_in_step_2(second), vllm_server_timeout=10.0)
    mine.backend.answers.repeats = False  # as those of programs
    try:
        mine.train()
    finally:
        second.signal(signal.SIGCONT)
    assert not {3, 4} & set(mine.answered[second.url])
    assert "no answer within vllm_server_timeout=10.0 s" in mine.engine.replicas.servers[1].last_error
    assert_alike(mine, theirs, tmp_path / "saved")


def test_completions_that_are_cancelled_are_aborted(servers, start):
    mine = start(servers[0])
    server = mine.engine.replicas.servers[0]
    member = Population.sample(2, 5, 0).members[0]
    options = {"temperature": 0.0, "max_tokens": 200, "ignore_eos": True}
    prompts = [[5, i] for i in range(6, 22)]

    def complete():
        weights = ("restore", ()) if member is None else ("perturb", (member.seed, member.sign, 0.1))
        nothing = [None] * 16
        return [choice["token_ids"] for choice in server.complete(weights, prompts, options, nothing, nothing)]

    def generated():
        metrics = httpx.get(f"{server.url}/metrics").text
        return sum(map(float, re.findall(r"^vllm:generation_tokens_total{.*} (.*)$", metrics, re.MULTILINE)))

    expected, before = complete(), generated()
    with ThreadPoolExecutor() as threads:
        unwanted = threads.submit(complete)
        while not server._under_way:
            time.sleep(0.01)
        time.sleep(0.1)
        server.cancel()
        with pytest.raises(Cancelled):
            unwanted.result()
    server.call("checksum")  # which waits until nobody uses the weights
    assert generated() - before < 16 * 200
    assert complete() == expected


def test_updates_that_the_trainer_knows_nothing_of(servers, start):
    line = {"seeds": [1], "signs": [1], "utilities": [1.0], "learning_rate": 0.1, "in_place": True}

    def reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1 and not spoiled:
            spoiled.append(mine.engine.replicas.servers[1].call("update", line))
        return letters(completions)

    spoiled = []
    mine = start(*servers, reward_funcs=reward)
    with pytest.raises(ServerError, match="The vLLM server http.* has done other updates than this run"):
        mine.train()
    # A new run begins with the base model's weights everywhere
    mine = start(*servers, max_steps=1)
    mine.train()
    assert len(mine.engine.replicas.update_records) == 1


def test_the_step_fails_when_no_server_is_left(servers, start):
    second = servers[1]

    def reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            second.kill()
        return letters(completions)

    try:
        with pytest.raises(ServerError, match=f"No vLLM server is left.*\n{second.url}: .* is lost: "):
            start(second, reward_funcs=reward).train()
    finally:
        second.start()
        second.wait()


def test_servers_that_do_not_fit_the_run(servers, start):
    with pytest.raises(ServerError, match="torch.float32, but the run in bfloat16. Start the server with --dtype"):
        start(servers[0], bf16=True)
    with pytest.raises(ValueError, match="context of 256 tokens"):
        start(servers[0], max_completion_length=250)


def test_a_server_that_is_not_there(start):
    class Nowhere:
        url = f"http://127.0.0.1:{free_port()}"

    with pytest.raises(
        ConnectionError, match=f"No vLLM server is up at {Nowhere.url} after vllm_server_timeout=1.0 s"
    ):
        start(Nowhere, vllm_server_timeout=1.0)


def routes(server: Process) -> list[tuple[str, str]]:
    """Every method and path of a server, apart from the one that anyone may ask: as vLLM tells them itself."""
    described = httpx.get(f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {server.token}"}).json()
    found = [(method.upper(), path) for path, methods in described["paths"].items() for method in methods]
    assert {("POST", "/collective_rpc"), ("POST", "/v1/completions"), ("GET", "/health")} <= set(found)
    not_described = [("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/docs"), ("POST", COMPLETIONS)]
    return [route for route in (*found, *not_described) if route[1] != "/health"]


def test_sharded_server_with_a_token(start, plain, tmp_path, monkeypatch):
    server = Process(
        *("--tensor-parallel-size", "2", "--worker-extension-cls", f"{Watched.__module__}.{Watched.__name__}"),
        token="secret",
    )
    try:
        server.wait()
        request = {"method": "checksum"}
        assert httpx.post(f"{server.url}/collective_rpc", json=request).status_code == 401
        wrong = {"Authorization": "Bearer secrets"}
        assert httpx.post(f"{server.url}/collective_rpc", json=request, headers=wrong).status_code == 401
        for method, path in routes(server):
            for headers in ({}, wrong, {"Authorization": "secret"}):
                reply = httpx.request(method, f"{server.url}{path}", json={}, headers=headers)
                assert reply.status_code == 401, (method, path)
        with pytest.raises(ServerError, match="asks for a token: set the environment variable VLLM_API_KEY"):
            start(server)
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        mine, theirs = start(server), plain()
        workers = mine.engine.replicas.servers[0].call("bytes")
        whole = sum(parameter.nbytes for parameter in theirs.model.parameters())
        assert [worker["loaded"] for worker in workers] == [whole, 0]
        assert all(worker["kept"] == worker["trained"] < 0.6 * whole for worker in workers)
        mine.train()
        assert_alike(mine, theirs, tmp_path / "saved")
        # Small models are measured whole, larger ones on other weights in every part
        assert len(mine.engine.replicas.servers[0].call("checksum")) == 2
        mine.engine.replicas.servers[0].call("compute_with_a_copy", "model.layers.0.mlp.down_proj")
        with pytest.raises(LoadError, match=f"{server.url}: a change of model.layers.0.mlp.down_proj.weight has no"):
            start(server)
        checksums = [worker["checksum"] for worker in mine.engine.replicas.servers[0].call("checksum")]
        assert checksums == mine.optimizer.state_dict()["checksum"]
    finally:
        server.kill()


LORA = ("--enable-lora", "--max-loras", "3", "--max-lora-rank", "8")


@pytest.fixture(scope="module")
def servers_with_adapters():
    with running(Process(*LORA), Process(*LORA)) as started:
        yield started


def test_a_server_answers_for_a_group_of_members(servers_with_adapters, start, trainer, tmp_path, caplog):
    first, second = servers_with_adapters
    options = {"population_size": 8, "max_steps": 5, "evaluate_center": True, "num_generations": 2}
    seen = {}

    def reward(completions, trainer_state, **kwargs):
        step = trainer_state.global_step + 1
        seen[step] = seen.get(step, 0) + 1
        if step == 2 and seen[step] == 1:
            second.kill()
            second.start()
            second.wait()
            mine.delay = 0.5  # or the other would have done everything before this one has loaded the model
        return letters(completions)

    reward.__name__ = "letters"
    mine = start(first, second, perturbation="low_rank", vllm_lora=True, reward_funcs=reward, **options)
    assert "6 parameters that adapters cannot carry stay as they are" in caplog.text
    sizes = []

    def counted(weights, *args, complete):
        method, arguments = weights
        if method == "install":
            sizes.append(len(arguments[0]))
        return complete(weights, *args)

    for server in mine.engine.replicas.servers:
        server.complete = functools.partial(counted, complete=server.complete)
    mine.train()
    model = make_model(**tiny.HEADS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "proj" in name
    theirs = trainer(model, perturbation="low_rank", **options)
    theirs.train()
    assert set(sizes) == {2, 3}
    assert {1, 5} <= set(mine.answered[second.url])
    assert_alike(mine, theirs, tmp_path / "saved")
    assert len({log["reward_std"] for log in logs(mine)}) == 5


def test_servers_with_too_few_slots(servers, servers_with_adapters, start):
    options = {"perturbation": "low_rank", "vllm_lora": True}
    with pytest.raises(ServerError, match="has no adapters. Start it with --enable-lora --max-loras N"):
        start(servers[0], **options)
    with pytest.raises(ServerError, match="has adapters for 3 members: start it with --max-loras 4 or more"):
        start(servers_with_adapters[0], population_batch_size=4, **options)
    with pytest.raises(ServerError, match="at most 8, but `perturbation_rank=9`: .* a larger --max-lora-rank"):
        start(servers_with_adapters[0], perturbation_rank=9, **options)
