"""vLLM servers, which hold, perturb and update the weights. The trainer's process has none."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import ESConfig, launched_processes
from ..engines import VLLMServerEngine, VLLMServers
from ..evolution import EvolutionStrategy, Member
from ..fields import require
from ..run.metrics import side_by_side
from .base import Backend, model_name, require_saved_state, trained
from .results import Answer, Prompts, Result, results
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
        if inputs.has_adapter:
            raise ValueError(
                "An adapter (`peft_config`) with `vllm_mode='server'` is not supported. Set vllm_mode='colocate', or "
                "leave `peft_config` out to train all weights."
            )
        if inputs.source is None:
            raise TypeError(
                f"`model` is a {type(inputs.model).__name__}, but the weights are on the servers with "
                "`vllm_mode='server'`: give the name or folder that the servers were started with."
            )

    @property
    def has_whole_weights(self) -> bool:
        return False

    def start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.engine = self._make_engine(tokenizer)

    def _make_engine(self, tokenizer: PreTrainedTokenizerBase) -> VLLMServers:
        return VLLMServers(self.model, tokenizer, self.args)

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
        def answer(job: int, engine: VLLMServerEngine) -> tuple[range, Answer | None]:
            return self._answer(engine, prompts, model_name(*members[job]))

        evaluated = self.engine.evaluate([member for _, member in members], self.optimizer.sigma, answer)
        noise = []
        with contextlib.closing(evaluated):
            for count, done in enumerate(evaluated, 1):
                noise.append((done.server, done.noise_seconds))
                number, _ = members[done.job]
                own, answered = done.result
                yield results([number], own, prompts, answered, done.seconds, done.server), count
        self.noise_seconds += side_by_side(noise)

    def answer(self, prompts: Prompts, number: int) -> list[Result]:
        found = []
        for done in self.engine.share_out(lambda engine: self._answer(engine, prompts, "policy")):
            own, answer = done.result
            if own:  # or there are fewer prompts than servers
                found += results([number], own, prompts, answer, done.seconds, done.server)
        return found

    def _answer(self, engine: VLLMServerEngine, prompts: Prompts, model: str) -> tuple[range, Answer | None]:
        """Which of the prompts a server completes, and how."""
        own, size = engine.prompt_shard(len(prompts.rows)), self.args.generation_batch_size
        return own, self.answers.complete(engine, prompts, own, [model], None, size) if own else None
