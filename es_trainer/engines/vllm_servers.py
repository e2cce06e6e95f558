"""Completions by vLLM servers, which hold, perturb and update the weights. Only numbers and tokens travel."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..config import ESConfig
from ..evolution import Member
from ..rollout import Completion
from ..run.history import describe, make_optimizer, run_config
from .base import Engine
from .remote_strategy import RemoteStrategy
from .vllm_dispatch import Job, dispatch
from .vllm_replicas import Replica, Replicas
from .vllm_sampling import sampling_options
from .vllm_server_engine import VLLMServerEngine
from .vllm_server_pool import Server, ServerPool
from .vllm_weights import require_used_weights


T = TypeVar("T")


@dataclass(frozen=True)
class Done(Generic[T]):
    """
    What a server has done.

    Args:
        job ([`Job`]):
            The members and the prompts.
        server (`str`):
            URL of the server.
        result (`T`):
            What came of it.
        seconds (`float`):
            Time that it took.
        noise_seconds (`float`):
            Time for the perturbation.
    """

    job: Job
    server: str
    result: T
    seconds: float
    noise_seconds: float


class VLLMServers(Engine):
    """
    Generates on vLLM servers. Each server has all of the weights and does every update; members go to servers as these
    become free. The member of a server that is lost is evaluated by another.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model on the meta device, without weights.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Its tokenizer, or its processor.
        args ([`ESConfig`]):
            Generation parameters, and those that begin with `vllm_server_`.

    Raises:
        `ConnectionError`: If a server is not up within `args.vllm_server_timeout`.
    """

    reads_images = True
    replicas_kind: type[ServerPool] = Replicas
    engine_kind = VLLMServerEngine

    def __init__(
        self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase | ProcessorMixin, args: ESConfig
    ):
        super().__init__(model, processing_class, args)
        self.args = args
        self.max_new_tokens = sampling_options(args, self.eos_token_ids)["max_tokens"]
        self.replicas = self.replicas_kind(args)
        self._engines: dict[str, VLLMServerEngine] = {}
        self.context = min(server.model_info()["max_model_len"] for server in self.replicas.servers)

    # ---- the run ----

    def begin(self, named_parameters: list[tuple[str, nn.Parameter]], decayed: set[str]) -> RemoteStrategy:
        """
        Begin a run on all servers.

        Args:
            named_parameters (`list[tuple[str, nn.Parameter]]`):
                Parameters to train.
            decayed (`set[str]`):
                Names of those that `weight_decay` applies to.

        Returns:
            [`RemoteStrategy`]: the optimizer.

        Raises:
            [`ServerError`]: If a server does not have the model, or other weights than another server.
            [`LoadError`]: If a server does not compute with the weights that are trained.
        """
        optimizer = make_optimizer(named_parameters, decayed, run_config(self.args), kind=RemoteStrategy)
        optimizer.replicas = self.replicas
        self.replicas.header = describe(optimizer, self.args)
        parameters = dict(self.model.named_parameters())
        shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
        frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
        for server in self.replicas.servers:
            server.call("load_check", shapes, frozen)
            self._check_weights_are_used(server, [name for name, _ in named_parameters])
        self.replicas.replay([], None)
        return optimizer

    def _check_weights_are_used(self, server: Replica, names: list[str]) -> None:
        require_used_weights(
            names, server.overwritten, server.logprobs, self.tokenizer, self.context, where=f"{server.url}: "
        )

    # ---- completions ----

    def evaluate(
        self,
        members: Sequence[Member],
        sigma: float,
        num_prompts: int,
        do: Callable[[Job, VLLMServerEngine], T],
        splits: bool = True,
        repeats: bool = True,
    ) -> Iterator[Done[T]]:
        """
        Do something with each member.

        Args:
            members (`Sequence[Member]`):
                The members.
            sigma (`float`):
                Standard deviation of the noise.
            num_prompts (`int`):
                Number of prompts.
            do (`Callable`):
                Gets members, some of the prompts, and a server that answers as the members, in a thread of the server.
                It is called again, with another server, if that one is lost meanwhile.
            splits (`bool`, *optional*, defaults to `True`):
                Whether the prompts of a member can be shared out among servers.
            repeats (`bool`, *optional*, defaults to `True`):
                Whether a member can be given to another server while one takes too long.

        Returns:
            `Iterator[Done]`: members, or shares of their prompts, in the order in which servers are done with them.
        """

        def evaluate_on(job: Job, server: Server) -> Done[T]:
            return self._do(job, server, [members[number] for number in job.members], sigma, do)

        jobs = [Job(group, range(num_prompts)) for group in self._groups(members)]
        yield from self._dispatch(jobs, evaluate_on, splits, repeats)

    def share_out(
        self, num_prompts: int, do: Callable[[Job, VLLMServerEngine], T], repeats: bool = True
    ) -> list[Done[T]]:
        """
        Do something with the unperturbed weights, a share of it on each server.

        Args:
            num_prompts (`int`):
                Number of prompts.
            do (`Callable`):
                Gets a share of the prompts, and a server that answers.
            repeats (`bool`, *optional*, defaults to `True`):
                Whether a share can be given to another server while one takes too long.

        Returns:
            `list[Done]`: what came of each share, in the order of the prompts.
        """

        def do_on(job: Job, server: Server) -> Done[T]:
            return self._do(job, server, [], 0.0, do)

        jobs = Job((0,), range(num_prompts)).shares(-(-num_prompts // len(self.replicas.servers)))
        done = self._dispatch(jobs, do_on, splits=False, repeats=repeats)
        return sorted(done, key=lambda part: part.job.prompts.start)

    def _dispatch(
        self, jobs: Sequence[Job], do: Callable[[Job, Server], Done[T]], splits: bool, repeats: bool
    ) -> Iterator[Done[T]]:
        return dispatch(self.replicas, jobs, do, splits, repeats)

    def _groups(self, members: Sequence[Member]) -> list[tuple[int, ...]]:
        """Numbers of the members that a server evaluates together."""
        return [(number,) for number in range(len(members))]

    def _do(
        self,
        job: Job,
        server: Server,
        members: Sequence[Member],
        sigma: float,
        do: Callable[[Job, VLLMServerEngine], T],
    ) -> Done[T]:
        engine = self._engine(server)
        engine.give(members, sigma, job.prompts)
        start, noise_before = time.perf_counter(), server.noise_seconds
        result = do(job, engine)
        noise_seconds = server.noise_seconds - noise_before
        return Done(job, server.url, result, time.perf_counter() - start - noise_seconds, noise_seconds)

    def _engine(self, server: Server) -> VLLMServerEngine:
        if server.url not in self._engines:
            tokenizer = copy.deepcopy(self.tokenizer)
            self._engines[server.url] = self.engine_kind(self.model, tokenizer, self.args, server, self.context)
        return self._engines[server.url]

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
        [`Engine.generate`].
        """
        shares = self.share_out(
            len(prompt_ids), lambda job, engine: engine.generate(prompt_ids, seed, num_generations)
        )
        return [completion for done in shares for completion in done.result]

    # ---- saving ----

    def collect(self) -> dict[torch.Tensor, torch.Tensor]:
        """The weights of all parameters and buffers in host memory, keyed by the tensors of the model here."""
        tensors = {id(tensor): (name, tensor) for name, tensor in self.model.state_dict(keep_vars=True).items()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        bar = tqdm(tensors.items(), desc="Weights from a server", leave=False, disable=self.args.disable_tqdm)
        return {tensor: self.replicas.export(names.get(key, name), tensor) for key, (name, tensor) in bar}
