"""The best members of a run's last population, rebuilt from its history: `replay_top_members`."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..evolution import Member
from .history import begin_replay, end_replay, read_history, replay_step
from .member_adapters import MemberAdapters


MEMBER_FOLDER = "member-{}"  # 1 is the best


def replay_top_members(
    base_model: str | PreTrainedModel,
    history: str | Path,
    top_members: int,
    output_dir: str | Path,
    steps: int | None = None,
    **model_init_kwargs: Any,
) -> PreTrainedModel:
    """
    Rebuild the best members of a run's last population from the model that the run started with and its history.

    The members of update t were `weights before update t + sigma * sign * noise(seed)`. So the weights before the last
    update are saved as a model, the center, and each member as a LoRA adapter of it: `output_dir/member-1` has the
    highest reward. `PeftModel.from_pretrained(center, "output_dir/member-1")` loads it. Adapters of a model with tied
    embeddings must not be merged: PEFT would add the noise of the embeddings twice.

    Args:
        base_model (`str` or [`~transformers.PreTrainedModel`]):
            The model that the run started with; see [`replay`].
        history (`str` or `Path`):
            The run's `history.jsonl`, or the folder it is in. Its noise is low-rank.
        top_members (`int`):
            Number of members: those with the highest rewards in the line of the last update. Of members with the same
            reward, the first counts as the better one.
        output_dir (`str` or `Path`):
            Folder for the center and the members.
        steps (`int`, *optional*):
            Number of the update whose members they are. `None` takes the last.
        model_init_kwargs:
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`].

    Returns:
        [`~transformers.PreTrainedModel`]: The center.

    Raises:
        `ValueError`: If the history cannot be replayed (see [`replay`]), its noise is not low-rank, it is of an
            adapter, has no such update, or that has no `top_members` members with a reward; if adapters cannot carry
            a trained parameter; or if there are members in `output_dir` already.
    """
    header, lines = read_history(history, steps)
    _check_run(header, history, top_members)
    if not lines:
        raise ValueError(f"`top_members={top_members}`: no update of {history} is replayed, so there are no members.")
    *before, last = lines
    members = best_members(last, top_members)
    folder = Path(output_dir)
    if there := sorted(folder.glob(MEMBER_FOLDER.format("*"))):
        raise ValueError(f"`output_dir={str(output_dir)!r}` has members already ({there[0].name}): give another one.")
    model, optimizer = begin_replay(base_model, history, header, **model_init_kwargs)
    adapters = MemberAdapters(model, optimizer.weights)
    for line in before:
        replay_step(optimizer, line)
    for number, member in enumerate(members, 1):
        member_folder = folder / MEMBER_FOLDER.format(number)
        adapters.save(member, last.get("sigma", optimizer.sigma), member_folder, base_model=str(folder.resolve()))
    end_replay(optimizer)
    model.save_pretrained(folder)
    return model


def best_members(line: dict[str, Any], number: int) -> list[Member]:
    """
    The members with the highest rewards, the best first.

    Args:
        line (`dict[str, Any]`):
            An update's line of the history.
        number (`int`):
            How many.

    Raises:
        `ValueError`: If there are not so many, or not so many with a reward.
    """
    population = [Member(seed, sign) for seed, sign in zip(line["seeds"], line["signs"], strict=True)]
    if not 1 <= number <= len(population):
        raise ValueError(
            f"`top_members={number}` is not valid: the population has {len(population)} members; give 1 to that many."
        )
    known = [(reward, i) for i, reward in enumerate(line.get("rewards", [])) if reward is not None]
    if len(known) < number:
        raise ValueError(
            f"`top_members={number}`: only {len(known)} members of update {line['step']} have a reward. Give at most "
            "that many, or another update with `steps`."
        )
    best = sorted(known, key=lambda entry: (-entry[0], entry[1]))
    return [population[i] for _, i in best[:number]]


def member_folders(folder: str | Path) -> list[Path]:
    """
    The folders of members that `replay_top_members` wrote into a folder, the best first.

    Raises:
        `ValueError`: If there are none.
    """
    found = {path.name: path for path in Path(folder).glob(MEMBER_FOLDER.format("*"))}
    names = [MEMBER_FOLDER.format(number) for number in range(1, len(found) + 1)]
    if not found or set(names) != set(found):
        raise ValueError(
            f"The folder {str(folder)!r} has {f'the members {sorted(found)}' if found else 'no members'}. Give one "
            "that `es-trainer replay --top_members` wrote, with all members."
        )
    return [found[name] for name in names]


def _check_run(header: dict[str, Any], history: str | Path, top_members: int) -> None:
    """Whether adapters can be made of a run's members."""
    noise = header["config"]["perturbation"]
    if noise != "low_rank":
        raise ValueError(
            f"`top_members={top_members}`: the run of {history} had perturbation={noise!r}, and only the members of "
            "low-rank noise are LoRA adapters. Train with perturbation='low_rank', or leave out `top_members` to "
            "rebuild the trained model."
        )
    if any(name.startswith("base_model.model.") for name in header["parameters"]):
        raise ValueError(
            f"`top_members={top_members}`: the run of {history} trained an adapter, whose members are not LoRA "
            "adapters of a model. Leave out `top_members` to rebuild the trained adapter."
        )
