"""Completions that programs ask for, by OpenAI's API."""

import importlib.util
import weakref
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from ..agents import AgentFunc, Endpoint, ModelServer, Program, Programs, Session, listen
from ..config import ESConfig
from ..copies import own_copy
from ..data import NO_PROMPT
from ..engines import Engine
from ..engines.requests import Requests
from ..engines.sampling import derived_seed
from ..fields import require
from ..rollout import Completion
from ..run.processes import Processes
from .answers import Answers
from .results import Answer, Prompts
from .trainer_inputs import TrainerInputs


TOKENS = 2048  # of a program's longest call, as far as memory goes


class AgentAnswers(Answers):
    """
    Programs that ask a member for completions, one for each member, row and generation.

    Args:
        args ([`ESConfig`]):
            The config.
        agent_func (`Callable`):
            The program.
        processes ([`Processes`]):
            Those of the run. Each has a server of its own.
        progress (`bool`):
            Whether to show a bar of the programs.
    """

    has_prompts = False
    no_images = "programs ask for completions of texts. Leave `agent_func` out"
    repeats = False

    @classmethod
    def check_arguments(cls, args: ESConfig, inputs: TrainerInputs) -> None:
        """
        Raises:
            `TypeError`: If `agent_func` cannot be called.
            `ValueError`: If something else says who answers.
            `ImportError`: If a package is missing.
        """
        if not callable(inputs.agent_func):
            raise TypeError(
                f"`agent_func={inputs.agent_func!r}` is no function: give `agent_func(example, endpoint)`, which "
                "returns the reward."
            )
        if inputs.rollout_func is not None or inputs.has_turns:
            raise ValueError(
                "`agent_func` with `rollout_func`, `tools` or `environment_factory`: the program decides itself what "
                "the model is asked. Leave the others out."
            )
        require(
            args,
            args.eval_kl_prompts == 0,
            "eval_kl_prompts",
            "the rows of `agent_func` have no prompts to compare distributions on. Set it to 0.",
        )
        missing = [package for package in ("fastapi", "uvicorn") if importlib.util.find_spec(package) is None]
        if missing:
            raise ImportError(f"`agent_func` needs {missing[0]}: pip install 'es-trainer[agents]'.")

    def __init__(self, args: ESConfig, agent_func: AgentFunc, processes: Processes, progress: bool):
        super().__init__(args, progress)
        self.agent_func = agent_func
        # Now, as its port may be taken
        self._listening = listen(args.agent_port and args.agent_port + processes.rank)
        self._server: ModelServer | None = None

    def check(self, engine: Engine, name: str, dataset: Any) -> None:
        if self._server is None:
            self._server = self._serve(engine)

    def tokenize(self, engine: Engine, rows: list[dict[str, Any]]) -> list[list[int]]:
        return [[] for _ in rows]

    def _serve(self, engine: Engine) -> ModelServer:
        from ..agents.openai_api import make_app

        sampling = {name: getattr(self.args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        server = ModelServer(engine, sampling)
        server.start(make_app(server), self._listening)
        weakref.finalize(self, server.stop)
        return server

    def sizes(self, engine: Engine, prompts: Prompts) -> tuple[int, int | None]:
        rows = min(self.args.agent_concurrency, self.args.generation_batch_size or self.args.agent_concurrency)
        return min(engine.context or TOKENS, TOKENS), rows

    def complete(
        self,
        engine: Engine,
        asked: Sequence[Prompts],
        own: Sequence[int],
        models: Sequence[str],
        members: Any,
        batch_size: int | None,
    ) -> Answer:
        sessions, programs, rows = [], [], []
        for member, (model, prompts) in enumerate(zip(models, asked, strict=True)):
            for i in own:
                for number in range(prompts.number):
                    session = Session(model, member, derived_seed("agent", prompts.seed, i, number))
                    sessions.append(session)
                    programs.append(Program(example_of(prompts.rows[i]), Endpoint(self._server.base_url, session)))
                    rows.append(prompts.rows[i])
        self._run(engine.requests(members, batch_size), sessions, programs)
        completions = [_completion(session) for session in sessions]
        columns = list(map(_columns, sessions, programs, rows))
        prompt_tokens = [sum(call["usage"]["prompt_tokens"] for call in session.calls) for session in sessions]
        return completions, prompt_tokens, columns

    def _run(self, requests: Requests, sessions: list[Session], all_programs: list[Program]) -> None:
        programs = Programs(
            self.agent_func, self.args.agent_concurrency, self.args.agent_timeout, self.args.agent_errors
        )
        programs.waiting.extend(all_programs)
        with tqdm(
            total=len(all_programs),
            desc="Programs",
            leave=False,
            position=2,
            dynamic_ncols=True,
            disable=not self.progress,
        ) as bar:
            try:
                self._server.serve(
                    requests, programs, sessions, report=lambda left: bar.update(bar.total - left - bar.n)
                )
            finally:
                requests.close()
                programs.close()
                self._server.forget(sessions)


def example_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a program gets of a row."""
    return own_copy({key: value for key, value in row.items() if key != "prompt" or value != NO_PROMPT})


def _completion(session: Session) -> Completion:
    """What a member has answered in all calls of a program."""
    ids = [token for of_call in session.completion_ids for token in of_call]
    if not session.calls:
        return Completion(ids, "", truncated=False)
    last = session.calls[-1]
    text = last["reply"]["content"] or ""
    return Completion(ids, text, last["finish_reason"] == "length", messages=[last["reply"]])


def _columns(session: Session, program: Program, row: dict[str, Any]) -> dict[str, Any]:
    """What reward functions get beside the dataset's columns."""
    error = None
    if program.stopped:
        error = session.closed
    elif program.error is not None:
        error = f"{type(program.error).__name__}: {program.error}"
    prompt = session.calls[-1]["messages"] if session.calls else row["prompt"]
    result = program.result if error is None else None
    return {"prompt": prompt, "agent_result": result, "agent_calls": session.calls, "agent_error": error}
