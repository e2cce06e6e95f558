"""vLLM servers, which hold, perturb and update the weights. The trainer's process has none."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import ESConfig, launched_processes
from ..engines import VLLMServers
from ..evolution import EvolutionStrategy, Member, Population
from ..fields import require
from ..rollout import Completion
from ..run.metrics import side_by_side
from .base import Backend, require_saved_state, trained
from .results import Prompts, Result
from .trainer_inputs import TrainerInputs
from .vllm_arguments import check_vllm_arguments


class Servers(Backend):
    """Members go to servers as those become free."""

    loads_weights = False
    moves_model = False
    engine: VLLMServers

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        require(args, args.vllm_server_timeout > 0, "vllm_server_timeout", "it must be positive.")
        require(
            args,
            all(url.startswith(("http://", "https://")) for url in args.vllm_server_base_url or []),
            "vllm_server_base_url",
            "each URL must begin with http:// or https://, like 'http://localhost:8000'.",
        )
        require(
            args,
            launched_processes() == 1,
            "vllm_mode",
            f"the trainer of servers is one process, but {launched_processes()} were launched. Start the script with "
            "python, and more servers.",
        )
        require(args, not args.vllm_lora, "vllm_lora", "it needs vllm_mode='colocate'.")
        require(
            args,
            args.vllm_tensor_parallel_size == 1,
            "vllm_tensor_parallel_size",
            "it is for vllm_mode='colocate'; give --tensor-parallel-size to `es-trainer vllm-serve`.",
        )
        require(
            args,
            args.master_weights != "none",
            "master_weights",
            "members that a server evaluates would leave their rounding errors in its weights only; use 'device' or "
            "'host'.",
        )
        require_saved_state(args)
        check_vllm_arguments(args, inputs)
        if inputs.source is None:
            raise TypeError(
                f"`model` is a {type(inputs.model).__name__}, but the weights are on the servers with "
                "`vllm_mode='server'`: give the name or folder that the servers were started with."
            )
        if inputs.rollout_func is not None:
            raise ValueError(
                "`rollout_func` with `vllm_mode='server'`: the trainer has no weights to generate with. Use "
                "vllm_mode='colocate'."
            )
        if inputs.has_turns or inputs.agent_func is not None:
            raise ValueError(
                "Tools, environments and `agent_func` with `vllm_mode='server'` are not supported yet. Use "
                "vllm_mode='colocate'."
            )

    @property
    def has_whole_weights(self) -> bool:
        return False

    def start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.engine = VLLMServers(model, tokenizer, self.args)

    def begin(self, decayed: set[str]) -> EvolutionStrategy:
        self.optimizer = self.engine.begin(trained(self.model), decayed)
        return self.optimizer

    def start_checksum(self) -> None:
        return None

    def resume(self, update_records: list[dict[str, Any]]) -> None:
        self.engine.replicas.update_records = update_records

    def collect(self) -> dict[torch.Tensor, torch.Tensor]:
        return self.engine.collect()

    def evaluate(self, members: Sequence[tuple[int, Member]], prompts: Prompts) -> Iterator[tuple[list[Result], int]]:
        population = Population(tuple(member for _, member in members))
        evaluated = self.engine.evaluate(population, self.optimizer.sigma, prompts.ids, prompts.seed, prompts.number)
        noise = []
        with contextlib.closing(evaluated):
            for done, made in enumerate(evaluated, 1):
                noise.append((made.server, made.noise_seconds))
                number, _ = members[made.member]
                yield [self._result(number, prompts, made.completions, made.seconds, made.server)], done
        self.noise_seconds += side_by_side(noise)

    def answer(self, prompts: Prompts, number: int) -> list[Result]:
        start = time.perf_counter()
        completions = self.engine.generate(prompts.ids, prompts.seed, prompts.number)
        return [self._result(number, prompts, completions, time.perf_counter() - start, self.processes.rank)]

    def _result(
        self, number: int, prompts: Prompts, completions: list[Completion], seconds: float, generated_by: int | str
    ) -> Result:
        rows = [row for row in prompts.rows for _ in range(prompts.number)]
        num_tokens = sum(map(len, prompts.ids)) * prompts.number + sum(made.length for made in completions)
        return Result(number, range(len(prompts.rows)), rows, completions, num_tokens, seconds, generated_by)
