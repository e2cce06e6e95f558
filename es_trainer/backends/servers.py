"""vLLM servers, which hold, perturb and update the weights. The trainer's process has none."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..engines import VLLMServers
from ..evolution import EvolutionStrategy, Member, Population
from ..rollout import Completion
from ..run.metrics import side_by_side
from .base import Backend, trained
from .results import Prompts, Result


class Servers(Backend):
    """Members go to servers as those become free."""

    loads_weights = False
    moves_model = False
    engine: VLLMServers

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
