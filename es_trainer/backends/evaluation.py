"""Scoring, overlapping, exchanging and failing together, whatever the backend."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import TrainerState

from ..evolution import Member, Population
from ..rewards.scorer import Scorer
from ..rollout import Rollout, for_rewards
from ..run.metrics import Summary, summarize
from .base import Backend
from .results import Prompts, Result


MANY_BATCHES = 1 << 40  # more than an evaluation has


class Share(NamedTuple):
    """What processes tell each other of a member, or of a batch, on some of the prompts."""

    number: int
    prompts: range
    summary: Summary


def evaluate_population(
    backend: Backend,
    scorer: Scorer,
    population: Population,
    prompts: Prompts,
    state: TrainerState,
    mask_truncated: bool,
    report: Callable[[int], None],
    keep: Callable[[int, Rollout], None],
) -> tuple[np.ndarray, list[Summary]]:
    """
    Evaluate the members of a population.

    Args:
        backend ([`Backend`]):
            Evaluates them.
        scorer ([`Scorer`]):
            Rewards their completions.
        population ([`Population`]):
            The members.
        prompts ([`Prompts`]):
            What they complete.
        state ([`~transformers.TrainerState`]):
            What reward functions get.
        mask_truncated (`bool`):
            Whether truncated completions do not count.
        report (`Callable`):
            Told how many members are done, as they are.
        keep (`Callable`):
            Given the rollouts that were scored here, with the members' numbers.

    Returns:
        `tuple[np.ndarray, list[Summary]]`: rewards of shape `(members, prompts)`, NaN where no completion counts, and
        what to log, in the order of the members.
    """
    members = list(enumerate(population))
    # Where processes go through forward passes together, a failure has to end all of them before the next
    rounds = [[member] for member in members] if backend.in_lockstep else [members]
    shares: list[Share] = []
    with backend.ready(for_members=True):
        for some in rounds:

            def work(some: list[tuple[int, Member]] = some) -> list[Share]:
                return _evaluate_members(backend, scorer, some, prompts, state, mask_truncated, report, keep)

            shares += [share for part in backend.processes.exchange(work) for share in part]
    of_members = _by_number(shares)
    rewards = np.array([_rewards(of_members[number]) for number, _ in members])
    return rewards, [summary for number, _ in members for summary in _summaries(of_members[number])]


def _evaluate_members(
    backend: Backend,
    scorer: Scorer,
    members: Sequence[tuple[int, Member]],
    prompts: Prompts,
    state: TrainerState,
    mask_truncated: bool,
    report: Callable[[int], None],
    keep: Callable[[int, Rollout], None],
) -> list[Share]:
    shares: list[Share] = []
    scoring: list[tuple[Result, Callable[[], Rollout]]] = []

    def finish() -> None:
        for result, scored in scoring:
            rollout = scored()
            rewards = rollout.prompt_rewards(prompts.number, mask_truncated)
            shares.append(Share(result.member, result.prompts, summarize(rollout, rewards)))
            keep(result.member, rollout)

    # Both end at once if something fails, so that nobody does what is in vain
    with contextlib.ExitStack() as stack:
        stack.callback(scorer.cancel)
        evaluated = stack.enter_context(contextlib.closing(backend.evaluate(members, prompts)))
        for results, done in evaluated:
            # Async reward functions scored the members before while these were generated
            finish()
            scoring = []
            if backend.scores:
                # Others run here and now: on the main thread, and before other members get into the weights
                scoring = [(result, _begin(backend, scorer, result, state)) for result in results]
            report(done)
        finish()
    return shares


def evaluate_batches(
    backend: Backend,
    scorer: Scorer,
    dataloader: Iterable[list[dict[str, Any]]],
    prompts_of: Callable[[list[dict[str, Any]], int], Prompts],
    state: TrainerState,
    report: Callable[[], None],
) -> list[tuple[np.ndarray, list[Summary]]]:
    """
    Evaluate the weights as they are on the batches of a dataloader.

    Args:
        backend ([`Backend`]):
            Has the weights.
        scorer ([`Scorer`]):
            Rewards the completions.
        dataloader (`Iterable`):
            Batches of rows, the same on all processes.
        prompts_of (`Callable`):
            Makes the prompts of a batch and its number.
        state ([`~transformers.TrainerState`]):
            What reward functions get.
        report (`Callable`):
            Called after each batch.

    Returns:
        `list[tuple[np.ndarray, list[Summary]]]`: rewards of each batch, of shape `(prompts,)`, and what to log.
    """

    def answer(number: int, rows: list[dict[str, Any]]) -> list[Share]:
        prompts = prompts_of(rows, number)
        shares = []
        for result in backend.answer(prompts, number):
            if backend.scores:
                rollout = _begin(backend, scorer, result, state)()
                summary = summarize(rollout, rollout.prompt_rewards(prompts.number))
                shares.append(Share(number, result.prompts, summary))
        return shares

    def those_that_no_other_process_takes() -> list[Share]:
        shares = []
        with backend.processes.queue(MANY_BATCHES, backend.group_size) as queue:
            mine = queue.take()
            for number, rows in enumerate(dataloader):
                if number in mine:
                    shares += answer(number, rows)
                    mine = queue.take()
                report()
        return shares

    parts: list[list[Share]] = []
    if backend.in_lockstep:
        for number, rows in enumerate(dataloader):
            parts += backend.processes.exchange(lambda number=number, rows=rows: answer(number, rows))
            report()
    else:
        with backend.ready(for_members=False):
            parts = backend.processes.exchange(those_that_no_other_process_takes)
    of_batches = _by_number(share for part in parts for share in part)
    batches = [of_batches[number] for number in range(len(of_batches))]
    return [(_rewards(shares), _summaries(shares)) for shares in batches]


def _begin(backend: Backend, scorer: Scorer, result: Result, state: TrainerState) -> Callable[[], Rollout]:
    """Begin to score a result; what is returned waits for the scores."""
    messages = for_rewards(result.completions, result.rows[0]["prompt"])
    finish = scorer.begin(result.rows, messages, [completion.ids for completion in result.completions], state)

    def scored() -> Rollout:
        return Rollout(
            result.rows,
            result.completions,
            messages,
            finish(),
            result.num_tokens,
            result.seconds,
            result.generated_by,
            scored_by=backend.processes.rank,
        )

    return scored


def _by_number(shares: Iterable[Share]) -> dict[int, list[Share]]:
    found: dict[int, list[Share]] = {}
    for share in shares:
        found.setdefault(share.number, []).append(share)
    return found


def _rewards(shares: list[Share]) -> np.ndarray:
    """Those of all prompts, of which each share has some."""
    rewards = np.empty(sum(len(share.prompts) for share in shares))
    for share in shares:
        rewards[list(share.prompts)] = share.summary.rewards
    return rewards


def _summaries(shares: list[Share]) -> list[Summary]:
    summaries = [share.summary for share in shares]
    return summaries if len(summaries) == 1 else [summary.share(len(summaries)) for summary in summaries]
