"""vLLM servers, which hold, perturb and update the weights. The trainer's process has none."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..config import ESConfig, launched_processes
from ..engines import Done, Job, VLLMServerEngine, VLLMServers
from ..engines.vllm_prompts import has_processor
from ..evolution import EvolutionStrategy, Member
from ..fields import require
from ..run.metrics import side_by_side
from ..text_only import freeze, other_modalities
from .base import Backend, model_name, require_saved_state, trained
from .results import Answer, Prompts, Result, joined, results
from .trainer_inputs import TrainerInputs
from .vllm_arguments import check_vllm_arguments


class Servers(Backend):
    """Members, or some of their prompts, go to servers as those become free."""

    loads_weights = False
    moves_model = False
    engine_kind = VLLMServers
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

    def start(self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
        self.model = model
        self.engine = self.engine_kind(model, processing_class, self.args)

    def begin(self, decayed: set[str]) -> EvolutionStrategy:
        if self.answers.image_prompt is not None:
            self._check_processor()
            freeze(
                self.model,
                other_modalities(self.model),
                "servers keep what they make of an image for all members. To train them, too, set "
                "vllm_mode='colocate'",
            )
        self.optimizer = self.engine.begin(trained(self.model), decayed)
        return self.optimizer

    def _check_processor(self) -> None:
        if not has_processor(self.source, self.engine.images.processor, self.args):
            raise ValueError(
                f"`processing_class` is another processor than that of the model's files ({self.source}), with which "
                "servers process images. Save the model and this processor in a folder, and give that to the servers "
                "and as `model`; or set vllm_mode='colocate'."
            )

    def start_checksum(self) -> None:
        return None

    def resume(self, update_records: list[dict[str, Any]]) -> None:
        self.engine.replicas.update_records = update_records

    def collect(self) -> dict[torch.Tensor, torch.Tensor]:
        return self.engine.collect()

    def evaluate(self, members: Sequence[tuple[int, Member]], prompts: Prompts) -> Iterator[tuple[list[Result], int]]:
        numbers = [number for number, _ in members]
        of_member = len(prompts.of(numbers[0]).rows)

        def answer(job: Job, engine: VLLMServerEngine) -> Answer:
            asked = [prompts.of(numbers[i]) for i in job.members]
            return self._answer(engine, asked, job, [model_name(*members[i]) for i in job.members])

        evaluated = self.engine.evaluate(
            [member for _, member in members],
            self.optimizer.sigma,
            of_member,
            answer,
            self.answers.splits,
            self.answers.repeats,
        )
        noise = []
        parts: dict[int, list[Result]] = {}
        count = 0
        with contextlib.closing(evaluated):
            for done in evaluated:
                noise.append((done.server, done.noise_seconds))
                for part in self._results(done, [numbers[i] for i in done.job.members], prompts):
                    mine = parts.setdefault(part.number, [])
                    mine.append(part)
                    if sum(len(other.prompts) for other in mine) == of_member:
                        count += 1
                        yield [_whole(parts.pop(part.number))], count
        self.noise_seconds += side_by_side(noise)

    def answer(self, prompts: Prompts, number: int) -> list[Result]:
        shares = self.engine.share_out(
            len(prompts.rows),
            lambda job, engine: self._answer(engine, [prompts], job, ["policy"]),
            self.answers.repeats,
        )
        return [result for done in shares for result in self._results(done, [number], prompts)]

    def _answer(self, engine: VLLMServerEngine, asked: list[Prompts], job: Job, models: list[str]) -> Answer:
        return self.answers.complete(engine, asked, job.prompts, models, None, self.args.generation_batch_size)

    def _results(self, done: Done[Answer], numbers: Sequence[int], prompts: Prompts) -> list[Result]:
        asked = [prompts.of(number) for number in numbers]
        return results(numbers, done.job.prompts, asked, done.result, done.seconds / len(numbers), done.server)


def _whole(parts: list[Result]) -> Result:
    """The result of a member, whose prompts several servers may have shared out."""
    if len(parts) == 1:
        return parts[0]
    seconds = sum(part.seconds for part in parts)
    return replace(joined(parts), seconds=seconds, generated_by=parts[0].generated_by)
