"""Members that are dispatched to vLLM servers, whoever has the weights that are trained."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..config import ESConfig, launched_processes
from ..engines import Done, Job, VLLMServerEngine, VLLMServers
from ..evolution import Member
from ..fields import require
from ..run.metrics import side_by_side
from .base import Backend, model_name
from .results import Answer, Prompts, Result, joined, results
from .trainer_inputs import TrainerInputs
from .vllm_arguments import check_vllm_arguments


class Dispatched(Backend):
    """Members, or some of their prompts, go to servers as those become free."""

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
        check_vllm_arguments(args, inputs)

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
