"""Members evaluated by vLLM servers, which hold, perturb and update the weights. Only numbers and tokens travel."""

import base64
import contextlib
import math
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import httpx
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import ESConfig
from ..evolution import EvolutionStrategy, Population
from ..rollout import Completion
from ..run.history import describe, extend_digest, first_digest, make_optimizer, run_config
from ..weights.part import Part
from ..weights.store import Weights
from .base import Engine
from .live_weights import ANSWER, without_effect
from .vllm_sampling import common_seed, sampling_options
from .vllm_weights import load_error


T = TypeVar("T")

EXPORTED = 1 << 22  # weights in an answer
CONNECT_SECONDS = 5.0  # that a server may take to accept a connection


class ServerError(RuntimeError):
    """A vLLM server has refused something, or none is left."""


class ServerLost(ServerError):
    """A vLLM server does not answer, or has started anew."""


@dataclass(frozen=True)
class Answer:
    """
    What a server says of a member.

    Args:
        member (`int`):
            Its number.
        server (`str`):
            URL of the server.
        completions (`list[Completion]`):
            Of the first prompt, then of the second, and so on.
        seconds (`float`):
            Time for the completions.
        noise_seconds (`float`):
            Time for the perturbation.
    """

    member: int
    server: str
    completions: list[Completion]
    seconds: float
    noise_seconds: float


class Server:
    """
    A vLLM server, started with `es-trainer vllm-serve`.

    Args:
        url (`str`):
            Base URL.
        timeout (`float`):
            Seconds that an answer may take.
    """

    def __init__(self, url: str, timeout: float):
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.updates: int | None = None  # that it has done in this run; `None` if that is not known
        self.moved: list[dict[str, Any]] = []  # what its workers said of the last update
        self.problem = "it was never reached"
        self.lock = threading.Lock()  # of the thread that talks to it
        token = os.environ.get("VLLM_API_KEY")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout)),
            limits=httpx.Limits(max_connections=None),
        )

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            reply = self._http.get("/health", timeout=CONNECT_SECONDS)
        except httpx.RequestError as error:
            self.problem = f"{type(error).__name__}: {error}"
            return False
        if not reply.is_success:
            self.problem = f"/health answers {reply.status_code}"
        return reply.is_success

    def call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Call a method of the worker extension; returns what each worker answers."""
        answers = self._send("POST", "/collective_rpc", {"method": method, "args": args}, key="results")
        for answer in answers:
            if "error" in answer:
                kind = ServerLost if answer["error"].startswith("NotBegun") else ServerError
                raise kind(f"The vLLM server {self.url} failed to {method}: {answer['error']}")
        return answers

    def models(self) -> dict[str, Any]:
        """What it says about its model."""
        return self._send("GET", "/v1/models", key="data")[0]

    def complete(
        self, prompts: list[list[int]], options: dict[str, Any], seeds: list[int | None]
    ) -> list[dict[str, Any]]:
        """
        For each prompt, the `"token_ids"` of its completion and the `"finish_reason"`. Those with a seed are asked for
        one by one, as a request has one seed.

        The weights have to be the same until it returns. Each call has a salt of its own in vLLM's prefix cache: no
        other call reads the keys and values that it leaves there, whatever became of the request that wrote them.
        """
        options = {**options, "cache_salt": uuid.uuid4().hex}
        if seeds[0] is None:
            return self._complete(prompts, options)
        with ThreadPoolExecutor(len(prompts)) as requests:
            answers = requests.map(
                lambda prompt, seed: self._complete([prompt], {**options, "seed": seed}), prompts, seeds
            )
            return [choice for (choice,) in answers]

    def logprobs(self, prompt: list[int], tokens: int, salt: str) -> list[float]:
        """The highest log probabilities of tokens after a prompt, with a salt in vLLM's prefix cache."""
        # By their numbers, as several tokens may have the same text
        options = {**ANSWER, "max_tokens": tokens, "cache_salt": salt, "return_tokens_as_token_ids": True}
        (choice,) = self._complete([prompt], options)
        return [logprob for token in choice["logprobs"]["top_logprobs"] for logprob in token.values()]

    @contextlib.contextmanager
    def changed(self, name: str) -> Iterator[None]:
        """Inside, the weights of a parameter are others."""
        self.call("change", name)
        try:
            yield
        finally:
            self.call("settle")

    def _complete(self, prompts: list[list[int]], options: dict[str, Any]) -> list[dict[str, Any]]:
        request = {"prompt": prompts, "return_token_ids": True, **options}
        choices = self._send("POST", "/v1/completions", request, key="choices")
        if len(choices) != len(prompts):
            raise ServerError(
                f"The vLLM server {self.url} gave {len(choices)} completions for {len(prompts)} prompts."
            )
        if any(choice["finish_reason"] == "abort" for choice in choices):
            raise ServerLost(f"The vLLM server {self.url} broke off a completion: it is paused or ends.")
        return sorted(choices, key=lambda choice: choice["index"])

    def _send(self, verb: str, path: str, content: dict[str, Any] | None = None, *, key: str) -> Any:
        """What the server's answer has under `key`. A request is sent once: most of them change the server."""
        try:
            reply = self._http.request(verb, path, json=content)
        except httpx.RequestError as error:
            slow = isinstance(error, httpx.ReadTimeout)
            why = (
                f"no answer within vllm_server_timeout={self.timeout} s"
                if slow
                else f"{type(error).__name__}: {error}"
            )
            raise ServerLost(f"The vLLM server {self.url} is lost: {why}") from error
        if reply.is_server_error:
            raise ServerLost(f"The vLLM server {self.url} failed: {reply.status_code} {reply.text[:500]}")
        if reply.status_code in (401, 403):
            raise ServerError(
                f"The vLLM server {self.url} asks for a token: set the environment variable VLLM_API_KEY to the one "
                "that it was started with."
            )
        if reply.status_code == 404:
            raise ServerError(
                f"The vLLM server {self.url} does not know {path}: start it with `es-trainer vllm-serve`."
            )
        if reply.is_error:
            raise ServerError(f"The vLLM server {self.url} refused {path}: {reply.status_code} {reply.text[:500]}")
        try:
            return reply.json()[key]
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError(
                f"The vLLM server {self.url} answered {path} without {key!r}: {reply.text[:500]!r}. Something else "
                "than `es-trainer vllm-serve` listens there, or a proxy has answered."
            ) from error


class Jobs:
    """
    Work for several threads. What one could not finish goes to another.

    Args:
        count (`int`):
            Number of jobs.
    """

    def __init__(self, count: int):
        self._waiting = deque(range(count))
        self._open = count  # waiting or under way
        self._change = threading.Condition()

    @property
    def open(self) -> bool:
        """Whether anything is still to be done."""
        return self._open > 0

    def take(self) -> int | None:
        """The next job, as soon as there is one; `None` when all are done."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._open <= 0)
            return self._waiting.popleft() if self._open > 0 else None

    def done(self) -> None:
        """A job that was taken is done."""
        with self._change:
            self._open -= 1
            self._change.notify_all()

    def back(self, job: int) -> None:
        """A job that was taken is to be done by another."""
        with self._change:
            self._waiting.appendleft(job)
            self._change.notify_all()

    def stop(self) -> None:
        """Nothing is to be done any more."""
        with self._change:
            self._open = 0
            self._change.notify_all()


class VLLMServers(Engine):
    """
    Generates on vLLM servers. Each of them has all of the weights, and replays the updates; members go to servers as
    those become free.

    A server that is lost has its member done by another. When it is back, it replays the updates from the start and
    proves by checksums of the weights that it has caught up, before it gets members again.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model on the meta device, without weights.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        args ([`ESConfig`]):
            Generation parameters, and those that begin with `vllm_server_`.

    Raises:
        `ConnectionError`: If a server is not up within `args.vllm_server_timeout`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: ESConfig):
        super().__init__(model, tokenizer, args)
        self.args = args
        self.sampling = sampling_options(args, self.eos_token_ids)
        self.max_new_tokens = self.sampling["max_tokens"]
        urls = args.vllm_server_base_url or [f"http://{args.vllm_server_host}:{args.vllm_server_port}"]
        self.servers = [Server(url, args.vllm_server_timeout) for url in urls]
        self._wait_until_up()
        models = [server.models() for server in self.servers]
        self.context = min(described["max_model_len"] for described in models)
        self.header: dict[str, Any] = {}
        self.lines: list[dict[str, Any]] = []  # of the history: the updates that a server has to have done
        self.digests: list[str] = []  # of the history with so many lines
        self.checksum: list[list[int]] | None = None  # of the weights after the last of them, by worker
        self._witness = ""  # who has them
        self._proving = threading.Lock()

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self.args.vllm_server_timeout
        while missing := [server for server in self.servers if not server.is_up()]:
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"No vLLM server is up at {', '.join(server.url for server in missing)} after "
                    f"vllm_server_timeout={self.args.vllm_server_timeout} s ({missing[0].problem}). Start it with "
                    "`es-trainer vllm-serve --model ...`."
                )
            time.sleep(1)

    # ---- the run ----

    def begin(self, named_parameters: list[tuple[str, nn.Parameter]], decayed: set[str]) -> "ServedStrategy":
        """
        Begin a run on all servers.

        Args:
            named_parameters (`list[tuple[str, nn.Parameter]]`):
                Parameters to train.
            decayed (`set[str]`):
                Names of those that `weight_decay` applies to.

        Returns:
            [`ServedStrategy`]: the optimizer.

        Raises:
            [`ServerError`]: If a server does not have the model, or other weights than another server.
            [`LoadError`]: If a server does not compute with the weights that are trained.
        """
        optimizer = make_optimizer(named_parameters, decayed, run_config(self.args), kind=ServedStrategy)
        optimizer.servers = self
        self.header = describe(optimizer, self.args)
        shapes = {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}
        for server in self.servers:
            server.call("load_check", shapes)
            self._check_effect(server, [name for name, _ in named_parameters])
        self.go_to([], None)
        return optimizer

    def _check_effect(self, server: Server, names: list[str]) -> None:
        problems = without_effect(names, server.changed, server.logprobs, self.tokenizer, self.context)
        if problems:
            raise load_error([f"{server.url}: {problem}" for problem in problems])

    def go_to(self, lines: list[dict[str, Any]], checksum: list[list[int]] | None) -> None:
        """
        Bring the weights of all servers to where a history ends.

        Args:
            lines (`list[dict[str, Any]]`):
                The updates of the history.
            checksum (`list[list[int]]`, *optional*):
                What the weights must have then. If `None`, servers need only have the same.
        """
        self.lines, self.digests = [], [first_digest(self.header)]
        self.checksum, self._witness = checksum, "the checkpoint"
        for line in lines:
            self._add(line)
        with tqdm(
            total=len(lines) * len(self.servers),
            desc="Updates replayed on servers",
            disable=not lines or self.args.disable_tqdm,
        ) as bar:

            def bring(server: Server) -> None:
                with server.lock:
                    self._connect(server)
                    bar.update(server.updates)
                    while not self._catch_up(server):
                        bar.update()

            self._on_each(self.servers, bring)

    def _add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self.digests.append(extend_digest(self.digests[-1], line))

    def _connect(self, server: Server) -> None:
        """Find out where in the run a server is, or begin it."""
        dtype = (self.args.model_init_kwargs or {}).get("dtype", torch.float32)
        arguments = (self.header, str(dtype).removeprefix("torch."))
        positions = server.call("begin", *arguments)
        if not self._is_of_run(positions):
            positions = server.call("restart", *arguments)
        self._take_place(server, positions)

    def _catch_up(self, server: Server) -> bool:
        """Have a server do the next update that it has not done; whether there was none."""
        if server.updates == len(self.lines):
            return True
        self._do_next(server)
        return False

    def _do_next(self, server: Server) -> None:
        """Have a server do the update after its last one."""
        positions = server.call("update", self.lines[server.updates])
        self._take_place(server, positions)
        server.moved = positions

    def _is_of_run(self, positions: list[dict[str, Any]]) -> bool:
        """Whether the updates that workers have done are the first ones of this run."""
        return all(
            position["updates"] <= len(self.lines) and position["digest"] == self.digests[position["updates"]]
            for position in positions
        )

    def _take_place(self, server: Server, positions: list[dict[str, Any]]) -> None:
        """
        Note where in the run a server says that it is.

        Raises:
            [`ServerError`]: If its workers are not in this run, or it has done all updates and has other weights.
        """
        updates = positions[0]["updates"]
        if not self._is_of_run(positions):
            raise ServerError(
                f"The vLLM server {server.url} has done other updates than this run: a request reached it twice, or "
                "another trainer uses it. Give each trainer servers of its own, and start the run again with "
                "`resume_from_checkpoint=True`."
            )
        checksum = [position["checksum"] for position in positions]
        with self._proving:
            if updates == len(self.lines):
                if self.checksum is None:
                    self.checksum, self._witness = checksum, server.url
                if checksum != self.checksum:
                    raise ServerError(
                        f"The vLLM server {server.url} has other weights than {self._witness} after {updates} "
                        "updates. Start all servers with the same model, on the same kind of device and with the "
                        "same --tensor-parallel-size."
                    )
            server.updates = updates

    def update(self, line: dict[str, Any]) -> list[dict[str, Any]]:
        """
        Have all servers do an update.

        Returns:
            `list[dict]`: What the workers of a server say of it.

        Raises:
            [`ServerError`]: If no server did it, or their weights differ afterwards.
        """
        with self._proving:
            current = [server for server in self.servers if server.updates == len(self.lines)]
            self._add(line)
            self.checksum = None
        answers: list[list[dict[str, Any]]] = []

        def move(server: Server) -> None:
            with server.lock:
                # The thread that had it catch up may have done this already, or have lost the server
                if server.updates == len(self.lines) - 1:
                    self._do_next(server)
                if server.updates == len(self.lines):
                    answers.append(server.moved)

        self._on_each(current, move)
        if not answers:  # those that are behind would have to catch up first
            raise self._none_left()
        return answers[0]

    def _on_each(self, servers: Sequence[Server], do: Callable[[Server], None]) -> None:
        """Do something with each server at the same time. Those that are lost are left out, unless all are."""

        def attempt(server: Server) -> None:
            try:
                do(server)
            except ServerLost as error:
                server.updates, server.problem = None, str(error)

        with ThreadPoolExecutor(max(1, len(servers))) as threads:
            list(threads.map(attempt, servers))
        if all(server.updates is None for server in self.servers):
            raise self._none_left()

    def _none_left(self) -> ServerError:
        problems = "\n".join(f"{server.url}: {server.problem}" for server in self.servers)
        return ServerError(
            f"No vLLM server is left. Start them again, and the run with `resume_from_checkpoint=True`.\n{problems}"
        )

    # ---- completions ----

    def evaluate(
        self, population: Population, sigma: float, prompt_ids: list[list[int]], seed: int, num_generations: int
    ) -> Iterator[Answer]:
        """
        Have every member complete the prompts.

        Args:
            population ([`Population`]):
                The members.
            sigma (`float`):
                Standard deviation of the noise.
            prompt_ids (`list[list[int]]`):
                What `tokenize` returned.
            seed (`int`):
                Seed of the random numbers, common to the members.
            num_generations (`int`):
                Completions per prompt.

        Returns:
            `Iterator[Answer]`: As servers are done with them.
        """
        rows = [(prompt, number) for prompt in range(len(prompt_ids)) for number in range(num_generations)]

        def answer(number: int, server: Server) -> Answer:
            start = time.perf_counter()
            member = population.members[number]
            server.call("perturb", member.seed, member.sign, sigma)
            perturbed = time.perf_counter()
            completions = self._complete(server, rows, prompt_ids, seed)
            return Answer(number, server.url, completions, time.perf_counter() - perturbed, perturbed - start)

        yield from self._hand_out(len(population), answer)

    def generate(
        self,
        prompt_ids: list[list[int]],
        seed: int,
        num_generations: int = 1,
        members: None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """
        Complete the prompts with the unperturbed weights, on all servers together; see
        [`TransformersEngine.generate`].
        """
        rows = [(prompt, number) for prompt in range(len(prompt_ids)) for number in range(num_generations)]
        share = -(-len(rows) // len(self.servers))
        shares = [rows[start : start + share] for start in range(0, len(rows), share)]

        def answer(number: int, server: Server) -> tuple[int, list[Completion]]:
            server.call("restore")
            return number, self._complete(server, shares[number], prompt_ids, seed)

        answers = dict(self._hand_out(len(shares), answer))
        return [completion for number in range(len(shares)) for completion in answers[number]]

    def _complete(
        self, server: Server, rows: list[tuple[int, int]], prompt_ids: list[list[int]], seed: int
    ) -> list[Completion]:
        samples = self.sampling["temperature"] > 0
        seeds = [common_seed(seed, *row) if samples else None for row in rows]
        choices = server.complete([prompt_ids[prompt] for prompt, _ in rows], self.sampling, seeds)
        return [self._completion(choice["token_ids"], choice["finish_reason"] == "length") for choice in choices]

    def _hand_out(self, count: int, do: Callable[[int, Server], T]) -> Iterator[T]:
        """Do `count` jobs, each on a server that is free, and yield what comes of them as it comes."""
        jobs = Jobs(count)
        results: SimpleQueue[tuple[str, Any]] = SimpleQueue()

        def work(server: Server) -> None:
            with server.lock:
                try:
                    if self._joins(server, jobs):
                        self._work(server, jobs, do, results)
                except ServerLost as error:
                    server.updates, server.problem = None, str(error)
                except Exception as error:
                    results.put(("failed", error))
            results.put(("ended", None))

        for server in self.servers:
            threading.Thread(target=work, args=(server,), name=f"es_trainer-{server.url}", daemon=True).start()
        working = len(self.servers)
        try:
            while count:
                kind, result = results.get()
                if kind == "failed":
                    raise result
                if kind == "ended":
                    working -= 1
                    if working == 0:
                        raise self._none_left()
                else:
                    count -= 1
                    yield result
        finally:
            jobs.stop()

    def _joins(self, server: Server, jobs: Jobs) -> bool:
        """Whether a server has done all updates, or could make up for them while there was work for it."""
        if server.updates is None:
            if not (jobs.open and server.is_up()):
                return False
            self._connect(server)
        while jobs.open:
            if self._catch_up(server):
                return True
        return False

    def _work(
        self, server: Server, jobs: Jobs, do: Callable[[int, Server], T], results: "SimpleQueue[tuple[str, Any]]"
    ) -> None:
        while (job := jobs.take()) is not None:
            try:
                results.put(("done", do(job, server)))
            except ServerError:
                jobs.back(job)
                raise
            jobs.done()

    # ---- saving ----

    def collect(self) -> dict[torch.Tensor, torch.Tensor]:
        """The weights of all parameters and buffers, in host memory, by those of the model here."""
        tensors = {id(tensor): (name, tensor) for name, tensor in self.model.state_dict(keep_vars=True).items()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        bar = tqdm(tensors.items(), desc="Weights from a server", leave=False, disable=self.args.disable_tqdm)
        return {tensor: self.export(names.get(key, name), tensor) for key, (name, tensor) in bar}

    def export(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """
        Trained or frozen weights as they are saved.

        Args:
            name (`str`):
                Name of a parameter or buffer.
            like (`torch.Tensor`):
                A tensor of its shape, on any device.

        Returns:
            `torch.Tensor`: The weights, in host memory.
        """
        for server in self.servers:
            if server.updates != len(self.lines):
                continue
            try:
                with server.lock:
                    return _export(server, name, like)
            except ServerLost as error:
                server.updates, server.problem = None, str(error)
        raise self._none_left()


def _export(server: Server, name: str, like: torch.Tensor) -> torch.Tensor:
    pieces: list[list[dict[str, Any]]] = []
    low = 0
    while not pieces or low < max(part["size"] for part in pieces[0]):
        pieces.append(server.call("export", name, low, low + EXPORTED))
        low += EXPORTED
    whole = torch.empty(like.shape, dtype=getattr(torch, pieces[0][0]["dtype"]))
    for parts in zip(*pieces, strict=True):  # of each worker
        data = b"".join(base64.b64decode(part["data"]) for part in parts)
        if parts[0]["replica"] or not data:
            continue
        part = Part(name, like.shape, parts[0]["offset"], parts[0]["length"], parts[0]["period"])
        part.put_into(whole, torch.frombuffer(bytearray(data), dtype=whole.dtype))
    return whole


class ServedWeights(Weights):
    """Weights that are on servers: there is nothing here to look at, to cast or to hand out."""

    def check(self, model: nn.Module) -> None:
        """Servers check their own."""

    def not_finite(self) -> None:
        """Not known here."""

    def hand_out(self) -> None:
        """The model's parameters have no values."""

    def at_work(self) -> contextlib.AbstractContextManager[list[str]]:
        """Servers evaluate the unperturbed weights by themselves."""
        return contextlib.nullcontext([])


class ServedStrategy(EvolutionStrategy):
    """
    An [`EvolutionStrategy`] whose weights are on servers: parameters here are on the meta device.

    It asks and is told as always. A step is done by all servers, each for itself.
    """

    weights_kind = ServedWeights
    servers: VLLMServers
    distance = 0.0

    def restore(self) -> None:
        """Servers do that by themselves, before they use the unperturbed weights."""

    def step(self, closure: None = None) -> None:
        """Have the servers move the weights by what was told, and forget it."""
        line = {**asdict(self.update_record), "learning_rate": self.param_groups[0]["lr"], "in_place": True}
        answers = self.servers.update(line)
        self.update_norm = math.hypot(*(answer["update_norm"] for answer in answers))
        self.distance = math.hypot(*(answer["distance"] for answer in answers))
        self.updates += 1
        self.update_record = None

    def distance_from_start(self) -> float:
        """Euclidean distance between the weights and the initial ones, as the servers measured it."""
        return self.distance

    def state_dict(self) -> dict[str, Any]:
        """All that is kept here: the history has the rest."""
        return {"updates": self.updates, "checksum": self.servers.checksum}

    def load_parts(self, parts: Sequence[dict[str, Any]]) -> None:
        """Go on from a state; the history has to be given to the servers before, as `servers.lines`."""
        self.updates = parts[0]["updates"]
        self.servers.go_to(self.servers.lines[: self.updates], parts[0]["checksum"])
