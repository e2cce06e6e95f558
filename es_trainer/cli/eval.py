"""`es-trainer eval`"""

import json
from dataclasses import asdict, dataclass, field
from itertools import islice
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import DatasetMixtureConfig

from ..scripts.arguments import GenerationArguments, Parser, RewardArguments


if TYPE_CHECKING:
    import numpy as np

    from ..agents import AgentFunc
    from ..config import ESConfig
    from ..rewards.scorer import Scorer
    from ..rollout import Completion, Generations
    from .generation import Generator


@dataclass
class EvalArguments(RewardArguments, GenerationArguments):
    """
    Arguments of `es-trainer eval`, beside those of [`GenerationArguments`] and [`RewardArguments`].

    Args:
        dataset_name (`str`, *optional*):
            Dataset: a name, a folder, or a JSON, CSV or Parquet file.
        dataset_config (`str`, *optional*):
            Its configuration.
        dataset_split (`str`, *optional*):
            Split to score. If `None`, `"test"`, or the only one there is.
        dataset_streaming (`bool`, *optional*, defaults to `False`):
            Whether to load no more rows than are scored.
        limit (`int`, *optional*):
            Number of rows to score, from the first one on. If `None`, all.
        reward_weights (`list[float]`, *optional*):
            Weight of each reward in their sum; 1.0 if not given.
        reward_workers (`int`, *optional*, defaults to `0`), reward_timeout (`float`, *optional*):
        reward_retry_on (`list[str]`, *optional*), reward_retries (`int`, *optional*, defaults to `5`):
            How reward functions are called: as in [`ESConfig`].
        num_samples (`int`, *optional*, defaults to `1`):
            Completions of each prompt. More than one needs `temperature > 0`.
        pass_threshold (`float`, *optional*, defaults to `1.0`):
            A completion passes if its (weighted) reward is at least this.
        ensemble (`bool`, *optional*, defaults to `False`):
            Whether to score the members that `es-trainer replay --top_members` wrote into the model's folder, too: the
            best of them, and their majority. Each member answers every prompt, and the answer that most of them give
            is scored; of answers that equally many give, that of the better member.
        majority_key (`str`, *optional*):
            Dotted path of a function that returns the answer that a completion (text or messages) gives. If `None`,
            it is the text.
        output (`str`, *optional*):
            JSON file for settings, versions, metrics, completions and rewards.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset: a name, a folder, or a JSON, CSV or Parquet file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split to score. If `None`, 'test', or the only one there is."}
    )
    dataset_streaming: bool = field(default=False, metadata={"help": "Whether to load no more rows than are scored."})
    limit: int | None = field(default=None, metadata={"help": "Number of rows to score. If `None`, all."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each reward in their sum."})
    reward_workers: int = field(default=0, metadata={"help": "Completions that are scored at the same time."})
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that a reward function may take for a completion."}
    )
    reward_retry_on: list[str] | None = field(
        default=None, metadata={"help": "Exceptions after which a reward function is called again."}
    )
    reward_retries: int = field(default=5, metadata={"help": "How often it is called again at most."})
    num_samples: int = field(
        default=1, metadata={"help": "Completions of each prompt. More than one needs `temperature > 0`."}
    )
    pass_threshold: float = field(
        default=1.0, metadata={"help": "A completion passes if its (weighted) reward is at least this."}
    )
    ensemble: bool = field(
        default=False,
        metadata={
            "help": "Whether to score the members that `replay --top_members` wrote into the model's folder, too: "
            "the best of them, and their majority vote."
        },
    )
    majority_key: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path of a function that returns the answer that a completion gives, such as my_lib.key. "
            "If `None`, it is the text."
        },
    )
    output: str | None = field(
        default=None, metadata={"help": "JSON file for settings, versions, metrics, completions and rewards."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples < 1:
            raise ValueError(f"`num_samples={self.num_samples}` is not valid: it must be at least 1.")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"`num_samples={self.num_samples}`: greedy decoding (temperature=0.0) gives the same completion every "
                "time; set temperature > 0."
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit={self.limit}` is not valid: it must be at least 1.")
        if self.ensemble and self.agent is not None:
            raise ValueError(
                "`ensemble` is given together with `agent`: members vote on answers to prompts, not on what a program "
                "did with them. Leave out one of them."
            )
        if self.majority_key is not None and not self.ensemble:
            raise ValueError("`majority_key` has no effect without `ensemble`: set both, or leave it out.")


@dataclass
class Results:
    """
    What a model got.

    Args:
        model (`str`):
            Its name.
        rows (`list[dict[str, Any]]`):
            Prompts with their completions and rewards.
        by_prompt (`dict[str, np.ndarray]`):
            Every metric of each prompt; NaN where it does not apply.
    """

    model: str
    rows: list[dict[str, Any]]
    by_prompt: dict[str, "np.ndarray"]


def main(argv: list[str]) -> None:
    """Evaluate, print a table and write a JSON file."""
    (arguments,) = Parser(EvalArguments, prog="es-trainer eval").parse_args_and_config(argv)
    results = evaluate(arguments)
    _print_table(results, arguments.pass_threshold)
    if arguments.output is not None:
        path = Path(arguments.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_report(arguments, results), indent=2, ensure_ascii=False))


def evaluate(arguments: EvalArguments) -> list[Results]:
    """
    Let models complete the prompts of a dataset and score what they wrote.

    Args:
        arguments ([`EvalArguments`]):
            Models, data, rewards and how to generate.

    Returns:
        `list[Results]`: Those of the model to compare with, if there is one, and of the model; and with `ensemble`,
        those of its best member and of the majority.

    Raises:
        `ValueError`: If something given cannot work.
    """
    from ..agents import reward_func as of_agent
    from ..rewards.caller import CallSettings
    from ..rewards.scorer import Scorer
    from ..rollout import Generations
    from ..run.top_members import member_folders
    from ..scripts.data import check_data, import_function, load_agent, load_data

    mixture = DatasetMixtureConfig()
    check_data(arguments, mixture)
    members = member_folders(arguments.model_name_or_path) if arguments.ensemble else []
    key = None if arguments.majority_key is None else import_function("majority_key", arguments.majority_key)
    vote = Generations("majority", key)
    config = arguments.to_config()
    splits, reward_funcs = load_data(arguments, mixture)
    rows = _rows(splits, arguments)
    agent = load_agent(arguments.agent)
    of_environments = [] if agent is None else [of_agent(agent)]
    calls = CallSettings.of(arguments)
    scorer = Scorer(reward_funcs, arguments.reward_weights, of_environments=of_environments, calls=calls)
    scorer.load_models(config)
    results = [_evaluate_model(name, rows, scorer, config, arguments, agent) for name in arguments.models]
    if members:
        results += _evaluate_ensemble(members, rows, scorer, config, arguments, vote)
    return results


def mean_and_error(values: "np.ndarray") -> tuple[float, float]:
    """Mean of the values that are not NaN, and its standard error; NaN where there are too few."""
    import numpy as np

    known = values[~np.isnan(values)]
    mean = float(known.mean()) if known.size else np.nan
    return mean, float(known.std(ddof=1)) / sqrt(known.size) if known.size > 1 else np.nan


def _rows(splits: Any, arguments: EvalArguments) -> list[dict[str, Any]]:
    from ..data import NO_PROMPT, collate
    from ..scripts.data import pick_split

    name = arguments.dataset_split or (next(iter(splits)) if len(splits) == 1 else "test")
    rows = list(islice(pick_split(splits, "dataset_split", name), arguments.limit))
    if not rows:
        raise ValueError(f"There is nothing to evaluate: the split {name!r} has no rows.")
    if arguments.agent is not None:
        return [{"prompt": NO_PROMPT, **row} for row in rows]
    if "prompt" not in rows[0]:
        raise ValueError(f"The dataset has no column 'prompt'; its columns are {list(rows[0])}. Rename one of them.")
    return collate(rows, "dataset")


def _evaluate_model(
    name: str,
    rows: list[dict[str, Any]],
    scorer: "Scorer",
    config: "ESConfig",
    arguments: EvalArguments,
    agent: "AgentFunc | None",
) -> Results:
    from .generation import Generator

    generator = Generator(name, config)
    if agent is not None:
        return _score(name, *_run_agent(generator, agent, rows, arguments.num_samples), scorer, arguments)
    completions = generator.answer([row["prompt"] for row in rows], arguments.num_samples)
    return _score(name, completions, _repeated(rows, arguments), scorer, arguments)


def _evaluate_ensemble(
    members: list[Path],
    rows: list[dict[str, Any]],
    scorer: "Scorer",
    config: "ESConfig",
    arguments: EvalArguments,
    vote: "Generations",
) -> list[Results]:
    """The best member, and the majority of all."""
    from .generation import Generator

    prompts = [row["prompt"] for row in rows]
    completions = [
        Generator(arguments.model_name_or_path, config, member).answer(prompts, arguments.num_samples)
        for member in members
    ]
    repeated = _repeated(rows, arguments)
    majority = majority_of(completions, prompts[0], vote)
    return [
        _score(str(members[0]), completions[0], repeated, scorer, arguments),
        _score(f"majority of {len(members)} members", majority, repeated, scorer, arguments),
    ]


def majority_of(members: list[list["Completion"]], prompt: Any, vote: "Generations") -> list["Completion"]:
    """
    The completions with the answers that most members give.

    Args:
        members (`list[list[Completion]]`):
            Completions of the same prompts by each member, the best member first.
        prompt (`Any`):
            One of the prompts.
        vote ([`Generations`]):
            What answer a completion gives.

    Returns:
        `list[Completion]`: Of each prompt, the completion of the best member that gives the answer. Of answers that
        equally many give, that of the better member counts.
    """
    from ..evolution.generations import elected
    from ..rollout import for_rewards

    of_prompts = list(zip(*members, strict=True))
    messages = for_rewards([completion for completions in of_prompts for completion in completions], prompt)
    answers = vote.keys(messages, len(members))
    return [completions[elected(given)] for completions, given in zip(of_prompts, answers, strict=True)]


def _repeated(rows: list[dict[str, Any]], arguments: EvalArguments) -> list[dict[str, Any]]:
    """The row of each completion."""
    return [row for row in rows for _ in range(arguments.num_samples)]


def _score(
    name: str,
    completions: list["Completion"],
    repeated: list[dict[str, Any]],
    scorer: "Scorer",
    arguments: EvalArguments,
) -> Results:
    import numpy as np
    from transformers import TrainerState

    from ..evolution.generations import pass_at, tries
    from ..images import without_images
    from ..rollout import for_rewards

    number = arguments.num_samples
    messages = for_rewards(completions, repeated[0]["prompt"])
    parts = []
    size = len(repeated) if scorer.has_sets else arguments.batch_size  # of completions that are scored together
    for start in range(0, len(repeated), size):
        part = slice(start, start + size)
        ids = [completion.ids for completion in completions[part]]
        parts.append(scorer(repeated[part], messages[part], ids, TrainerState()))
    shape = len(repeated) // number, number
    rewards = {
        reward: np.concatenate([part.by_function[:, i] for part in parts]).reshape(shape)
        for i, reward in enumerate(scorer.names)
    }
    total = np.concatenate([part.total for part in parts]).reshape(shape)
    passed = (total >= arguments.pass_threshold).astype(np.float64)  # NaN does not pass

    by_prompt = {"reward": _mean(total), **{f"rewards/{key}": _mean(values) for key, values in rewards.items()}}
    for k in tries(number):
        by_prompt[f"pass@{k}"] = np.array([pass_at(of_prompt, k) for of_prompt in passed])
    lengths = np.array([len(completion.ids) for completion in completions], dtype=np.float64)
    clipped = np.array([completion.truncated for completion in completions], dtype=np.float64)
    by_prompt["completions/mean_length"] = _mean(lengths.reshape(shape))
    by_prompt["completions/clipped_ratio"] = _mean(clipped.reshape(shape))
    recorded = [
        {
            "prompt": without_images(repeated[i * number]["prompt"]),
            "completions": [completion.text for completion in completions[i * number : (i + 1) * number]],
            "reward": _json(total[i]),
            "rewards": {key: _json(values[i]) for key, values in rewards.items()},
        }
        for i in range(shape[0])
    ]
    return Results(name, recorded, by_prompt)


def _run_agent(
    generator: "Generator", agent: "AgentFunc", rows: list[dict[str, Any]], number: int
) -> tuple[list["Completion"], list[dict[str, Any]]]:
    """What a program's calls were answered, and its rows with what reward functions get beside them."""
    from ..backends import Prompts
    from ..backends.agent_answers import AgentAnswers
    from ..backends.results import results
    from ..run.processes import Processes

    answers = AgentAnswers(generator.config, agent, Processes(), progress=not generator.config.disable_tqdm)
    answers.check(generator, "dataset", None)
    prompts = Prompts(rows, [[] for _ in rows], number, generator.config.seed)
    own, size = range(len(rows)), generator.config.generation_batch_size
    answer = answers.complete(generator, [prompts], own, ["policy"], None, size)
    (result,) = results([0], own, [prompts], answer, seconds=0.0, generated_by=generator.name)
    return result.completions, result.rows


def _mean(values: "np.ndarray") -> "np.ndarray":
    """Of each prompt's completions; NaN where no value applies."""
    from ..evolution.fitness import mean

    return mean(values, axis=1)


def _differences(results: list[Results]) -> dict[str, "np.ndarray"]:
    """The last model minus the first."""
    before, after = results[0], results[-1]
    return {name: after.by_prompt[name] - before.by_prompt[name] for name in after.by_prompt}


def _report(arguments: EvalArguments, results: list[Results]) -> dict[str, Any]:
    from .env import versions

    def summary(by_prompt: dict[str, "np.ndarray"]) -> dict[str, Any]:
        numbers = {name: _json(mean_and_error(values)) for name, values in by_prompt.items()}
        return {name: {"mean": mean, "standard_error": error} for name, (mean, error) in numbers.items()}

    return {
        "settings": asdict(arguments),
        "versions": versions(),
        "models": [
            {"model": result.model, "metrics": summary(result.by_prompt), "rows": result.rows} for result in results
        ],
        **({"difference": summary(_differences(results))} if len(results) > 1 else {}),
    }


def _json(values: Any) -> list[float | None]:
    from ..run.metrics import json_number

    return [json_number(float(value)) for value in values]


def _print_table(results: list[Results], pass_threshold: float) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {result.model: result.by_prompt for result in results}
    if len(results) > 1:
        columns["difference"] = _differences(results)
    caption = f"A completion passes with a reward of {pass_threshold:g} or more."
    if len(results) > 2:
        caption += " The difference is the last model's minus the first's."
    table = Table(title=f"{len(results[0].rows)} prompts: mean ± standard error", caption=caption)
    table.add_column("", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for metric in results[0].by_prompt:
        cells = (mean_and_error(by_prompt[metric]) for by_prompt in columns.values())
        table.add_row(metric, *(f"{mean:.4g} ± {error:.2g}" for mean, error in cells))
    Console().print(table)
