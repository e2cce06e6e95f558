"""Completions by vLLM servers, which hold, perturb and update the weights. Only numbers and tokens travel."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import ESConfig
from ..evolution import Population
from ..rollout import Completion
from ..run.history import describe, make_optimizer, run_config
from .base import Engine
from .live_weights import find_unused_weights
from .remote_strategy import RemoteStrategy
from .vllm_dispatch import dispatch
from .vllm_replicas import Replica, Replicas
from .vllm_sampling import common_seed, sampling_options
from .vllm_weights import load_error


@dataclass(frozen=True)
class MemberCompletions:
    """
    What a member completed on a server.

    Args:
        member (`int`):
            Number of the member in its population.
        server (`str`):
            URL of the server.
        completions (`list[Completion]`):
            Completions of the first prompt, then of the second, and so on.
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


class VLLMServers(Engine):
    """
    Generates on vLLM servers. Each server has all of the weights and does every update; members go to servers as these
    become free. The member of a server that is lost is evaluated by another.

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
        self.replicas = Replicas(args)
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
        shapes = {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}
        for server in self.replicas.servers:
            server.call("load_check", shapes)
            self._check_weights_are_used(server, [name for name, _ in named_parameters])
        self.replicas.replay([], None)
        return optimizer

    def _check_weights_are_used(self, server: Replica, names: list[str]) -> None:
        problems = find_unused_weights(names, server.overwritten, server.logprobs, self.tokenizer, self.context)
        if problems:
            raise load_error([f"{server.url}: {problem}" for problem in problems])

    # ---- completions ----

    def evaluate(
        self, population: Population, sigma: float, prompt_ids: list[list[int]], seed: int, num_generations: int
    ) -> Iterator[MemberCompletions]:
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
            `Iterator[MemberCompletions]`: Members in the order in which servers are done with them.
        """
        rows = [(prompt, number) for prompt in range(len(prompt_ids)) for number in range(num_generations)]

        def evaluate_on(number: int, server: Replica) -> MemberCompletions:
            start = time.perf_counter()
            member = population.members[number]
            server.call("perturb", member.seed, member.sign, sigma)
            perturbed = time.perf_counter()
            completions = self._complete(server, rows, prompt_ids, seed)
            seconds = time.perf_counter() - perturbed
            return MemberCompletions(number, server.url, completions, seconds, perturbed - start)

        yield from dispatch(self.replicas, len(population), evaluate_on)

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
        size = -(-len(rows) // len(self.replicas.servers))
        shares = [rows[start : start + size] for start in range(0, len(rows), size)]

        def generate_on(number: int, server: Replica) -> tuple[int, list[Completion]]:
            server.call("restore")
            return number, self._complete(server, shares[number], prompt_ids, seed)

        completions = dict(dispatch(self.replicas, len(shares), generate_on))
        return [completion for number in range(len(shares)) for completion in completions[number]]

    def _complete(
        self, server: Replica, rows: list[tuple[int, int]], prompt_ids: list[list[int]], seed: int
    ) -> list[Completion]:
        samples = self.sampling["temperature"] > 0
        seeds = [common_seed(seed, *row) if samples else None for row in rows]
        choices = server.complete([prompt_ids[prompt] for prompt, _ in rows], self.sampling, seeds)
        return [self._completion(choice["token_ids"], choice["finish_reason"] == "length") for choice in choices]

    # ---- saving ----

    def collect(self) -> dict[torch.Tensor, torch.Tensor]:
        """The weights of all parameters and buffers in host memory, keyed by the tensors of the model here."""
        tensors = {id(tensor): (name, tensor) for name, tensor in self.model.state_dict(keep_vars=True).items()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        bar = tqdm(tensors.items(), desc="Weights from a server", leave=False, disable=self.args.disable_tqdm)
        return {tensor: self.replicas.export(names.get(key, name), tensor) for key, (name, tensor) in bar}
