"""vLLM servers with members as LoRA adapters: each server answers for a group of members in one batch."""

import contextlib
from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import ESConfig
from ..engines import VLLMLoRAServers, VLLMServerEngine
from ..evolution import Member
from ..run.metrics import side_by_side
from .base import model_name
from .low_rank_adapters import check_low_rank, freeze_parameters_without_slots
from .results import Answer, Prompts, Result, results
from .servers import Servers
from .trainer_inputs import TrainerInputs


class ServersLoRA(Servers):
    """Groups of members go to servers as those become free."""

    engine: VLLMLoRAServers

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        check_low_rank(args)
        super().check_arguments(args, inputs)

    def _make_engine(self, tokenizer: PreTrainedTokenizerBase) -> VLLMLoRAServers:
        return VLLMLoRAServers(self.model, tokenizer, self.args)

    def start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().start(model, tokenizer)
        freeze_parameters_without_slots(model, self.engine.open_slots())

    def evaluate(self, members: Sequence[tuple[int, Member]], prompts: Prompts) -> Iterator[tuple[list[Result], int]]:
        groups = self._groups(members)

        def answer(job: int, engine: VLLMServerEngine, adapters: list[str | None]) -> tuple[range, Answer | None]:
            own, models = engine.prompt_shard(len(prompts.rows)), [model_name(*member) for member in groups[job]]
            size = self.args.generation_batch_size
            return own, self.answers.complete(engine, prompts, own, models, adapters, size)

        evaluated = self.engine.evaluate_groups(
            [[member for _, member in group] for group in groups], self.optimizer.sigma, answer
        )
        noise, count = [], 0
        with contextlib.closing(evaluated):
            for done in evaluated:
                noise.append((done.server, done.noise_seconds))
                numbers = [number for number, _ in groups[done.job]]
                own, answered = done.result
                count += len(numbers)
                seconds = done.seconds / len(numbers)
                yield results(numbers, own, prompts, answered, seconds, done.server), count
        self.noise_seconds += side_by_side(noise)

    def _groups(self, members: Sequence[tuple[int, Member]]) -> list[Sequence[tuple[int, Member]]]:
        """Members that a server evaluates together: no more than leaves something for the other servers."""
        # The unperturbed weights, which need no slot, go with the last members
        count = len(members) - int(members[-1][1].is_center)
        size = self.engine.group_size(count)
        starts = range(0, count, size) or [0]
        return [members[start : start + size if start + size < count else None] for start in starts]
