"""Scoring, overlapping, exchanging and failing together, whatever the backend."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from transformers import TrainerState

from ..evolution import Member, Population
from ..evolution.fitness import mean, normalized_sum
from ..evolution.signal import settled
from ..rewards.scorer import Scorer
from ..rollout import Rollout, Scores, for_rewards
from ..run.learning import Evaluation
from ..run.metrics import Summary, pass_metrics, summarize
from .base import Backend
from .results import Prompts, Result, joined, one_after_another


T = TypeVar("T")

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
    report: Callable[[int], None],
    keep: Callable[[int, Rollout], None],
) -> Evaluation:
    """
    Evaluate the members of a population. If the config says so, the unperturbed weights are one more member, so that
    they are asked the same in the same way.

    Args:
        backend ([`Backend`]):
            Evaluates them.
        scorer ([`Scorer`]):
            Rewards their completions.
        population ([`Population`]):
            The members.
        prompts ([`Prompts`]):
            What they complete, or, if the config says so, what is shared out among them.
        state ([`~transformers.TrainerState`]):
            What reward functions get.
        report (`Callable`):
            Told how many members are done, as they are.
        keep (`Callable`):
            Given the rollouts that were scored here, with the members' numbers.
    """
    size, center = len(population), backend.args.evaluate_center
    together = backend.args.members_per_prompt
    prompts = prompts.shared_out(size, together)
    members = list(enumerate(population))
    if center:
        members.append((size, population.members[0].center()))
    # Where processes go through forward passes together, a failure has to end all of them before the next
    rounds = [[member] for member in members] if backend.in_lockstep else [members]
    shares: list[Share] = []
    with backend.ready(for_members=True):
        for some in rounds:
            if backend.in_lockstep and scorer.has_sets:
                shares += _evaluate_sets(backend, scorer, some, prompts, state, report, keep)
                continue

            def work(some: list[tuple[int, Member]] = some) -> list[Share]:
                return _evaluate_members(backend, scorer, some, prompts, state, report, keep)

            shares += _flat(backend.processes.exchange(work))
    of_members = _by_number(shares)
    found = [_rewards(of_members[number]) for number in range(size)]
    rewards = np.array([rewards for rewards, _ in found])
    by_function = np.array([by_function for _, by_function in found]).swapaxes(0, 1)
    by_prompt = scorer.without_sets(rewards, by_function)
    normalized = backend.args.multi_objective_aggregation == "normalize_then_sum"
    return Evaluation(
        rewards=rewards,
        by_prompt=by_prompt,
        settled=settled(by_prompt, together),
        compared=normalized_sum(by_function, scorer.weights.numpy(), together) if normalized else rewards,
        members_per_prompt=together,
        center=mean(_rewards(of_members[size])[0]) if center else None,
        summaries=[summary for number in range(size) for summary in _summaries(of_members[number])],
        num_tokens=sum(share.summary.num_tokens for share in shares),
    )


def _evaluate_members(
    backend: Backend,
    scorer: Scorer,
    members: Sequence[tuple[int, Member]],
    prompts: Prompts,
    state: TrainerState,
    report: Callable[[int], None],
    keep: Callable[[int, Rollout], None],
) -> list[Share]:
    shares: list[Share] = []
    scoring: list[tuple[Result, Callable[[], Rollout]]] = []

    def finish() -> None:
        for result, scored in scoring:
            rollout = scored()
            shares.append(_of_member(backend, scorer, result, rollout))
            keep(result.number, rollout)

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


def _evaluate_sets(
    backend: Backend,
    scorer: Scorer,
    members: Sequence[tuple[int, Member]],
    prompts: Prompts,
    state: TrainerState,
    report: Callable[[int], None],
    keep: Callable[[int, Rollout], None],
) -> list[Share]:
    """The same where each process has some of the prompts, but a reward is about all completions of a member."""

    def generate() -> list[Result]:
        return _flat(results for results, _ in backend.evaluate(members, prompts))

    whole = joined(_flat(backend.processes.exchange(generate)))

    def score() -> Share:
        rollout = _begin(backend, scorer, whole, state)()
        keep(whole.number, rollout)
        return _of_member(backend, scorer, whole, rollout)

    share = backend.processes.on_first(score)
    report(members[-1][0] + 1)
    return [share]


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

    # Rewards that are about the completions of all batches come at the end, for which rollouts have to be kept
    kept: list[tuple[Result, Rollout]] = []

    def answer(number: int, rows: list[dict[str, Any]]) -> list[Share]:
        results = backend.answer(prompts_of(rows, number), number)
        if not backend.scores:
            return []
        scored = ((result, _begin(backend, scorer, result, state, ~scorer.of_sets)()) for result in results)
        if scorer.has_sets:
            kept.extend(scored)
            return []
        return [_of_batch(scorer, result, rollout) for result, rollout in scored]

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
    if scorer.has_sets:
        complete = _with_sets(backend, scorer, kept, state)
        parts = backend.processes.exchange(lambda: [_of_batch(scorer, *scored) for scored in complete])
    of_batches = _by_number(_flat(parts))
    batches = [of_batches[number] for number in range(len(of_batches))]
    return [(_rewards(shares)[0], _summaries(shares)) for shares in batches]


def _with_sets(
    backend: Backend, scorer: Scorer, mine: list[tuple[Result, Rollout]], state: TrainerState
) -> list[tuple[Result, Rollout]]:
    """Rollouts of this process with the rewards that are about those of all processes together."""
    found = _flat(backend.processes.exchange(lambda: [result for result, _ in mine]))
    if not found:
        return mine
    of_batches = _by_number(found)
    whole = one_after_another([joined(of_batches[number]) for number in range(len(of_batches))])

    def score() -> Scores:
        return _begin(backend, scorer, whole, state, scorer.of_sets)().scores

    of_set = backend.processes.on_first(score)
    return [(result, replace(rollout, scores=scorer.with_sets(rollout.scores, of_set))) for result, rollout in mine]


def _begin(
    backend: Backend, scorer: Scorer, result: Result, state: TrainerState, functions: np.ndarray | None = None
) -> Callable[[], Rollout]:
    """Begin to score a result, by all functions or some; what is returned waits for the scores."""
    messages = for_rewards(result.completions, result.rows[0]["prompt"])
    ids = [completion.ids for completion in result.completions]
    finish = scorer.begin(result.rows, messages, ids, state, functions)

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


def _of_member(backend: Backend, scorer: Scorer, result: Result, rollout: Rollout) -> Share:
    rewards = rollout.prompt_rewards(scorer.generations, result.generations, backend.args.mask_truncated_completions)
    return Share(result.number, result.prompts, summarize(rollout, rewards))


def _of_batch(scorer: Scorer, result: Result, rollout: Rollout) -> Share:
    summary = summarize(rollout, rollout.prompt_rewards(scorer.generations, result.generations))
    own = summary.own | pass_metrics(rollout, result.generations)
    return Share(result.number, result.prompts, summary._replace(own=own))


def _flat(parts: Iterable[Iterable[T]]) -> list[T]:
    return [item for part in parts for item in part]


def _by_number(items: Iterable[Any]) -> dict[int, list[Any]]:
    """Shares or results by the member, or the batch, that they are of."""
    found: dict[int, list[Any]] = {}
    for item in items:
        found.setdefault(item.number, []).append(item)
    return found


def _rewards(shares: list[Share]) -> tuple[np.ndarray, np.ndarray]:
    """Those of all prompts, of which each share has some: of shapes (prompts,) and (functions, prompts)."""
    found = np.empty((1 + len(shares[0].summary.by_function), sum(len(share.prompts) for share in shares)))
    for share in shares:
        found[:, list(share.prompts)] = [share.summary.rewards, *share.summary.by_function]
    return found[0], found[1:]


def _summaries(shares: list[Share]) -> list[Summary]:
    summaries = [share.summary for share in shares]
    return summaries if len(summaries) == 1 else [summary.share(len(summaries)) for summary in summaries]
