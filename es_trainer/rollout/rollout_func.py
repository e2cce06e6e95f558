"""Completions by a function of the user, in TRL's protocol."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .engine import Completion


if TYPE_CHECKING:
    from ..trainer import ESTrainer


RolloutFunc = Callable[[list[Any], "ESTrainer"], dict[str, Any]]


def call_rollout_func(
    rollout_func: RolloutFunc, prompts: list[Any], trainer: "ESTrainer", num_generations: int
) -> tuple[list[Completion], int, list[dict[str, Any]]]:
    """
    Let a function generate the completions.

    Args:
        rollout_func (`Callable`):
            Called with the prompts, once each, and the trainer.
        prompts (`list`):
            Texts or lists of messages.
        trainer ([`ESTrainer`]):
            Its model has the weights to generate with.
        num_generations (`int`):
            Completions that there have to be for each prompt.

    Returns:
        `tuple`: The completions, the number of tokens of all prompts, and what else the function returned about each
        completion.

    Raises:
        `ValueError`: If the function does not return what it should.
    """
    trainer.model.eval()  # no dropout
    output = dict(rollout_func(prompts, trainer))
    missing = {"prompt_ids", "completion_ids"} - output.keys()
    if missing:
        raise ValueError(f"`rollout_func` must return {sorted(missing)} in its dict, which has {sorted(output)}.")
    wanted = len(prompts) * num_generations
    for key, values in output.items():
        if values is not None and len(values) != wanted:
            raise ValueError(
                f"`rollout_func` returned {len(values)} entries in {key!r} for {len(prompts)} prompts with "
                f"{num_generations} completions each: there must be {wanted}."
            )
    prompt_ids, completion_ids = output.pop("prompt_ids"), output.pop("completion_ids")
    output.pop("logprobs", None)  # for policy gradients
    masks = output.pop("env_mask", None) or [[1] * len(ids) for ids in completion_ids]
    ends = {*trainer.engine.eos_token_ids, trainer.processing_class.pad_token_id}
    completions = []
    for row, (ids, mask) in enumerate(zip(completion_ids, masks, strict=True)):
        ids = list(map(int, ids))
        if not ids:
            raise ValueError(f"`rollout_func` returned no tokens in 'completion_ids' for completion {row}.")
        text = trainer.processing_class.decode(ids, skip_special_tokens=True)
        completions.append(Completion(ids, text, ids[-1] not in ends, len(mask) - sum(mask)))
    fields = [{key: values[row] for key, values in output.items()} for row in range(wanted)]
    return completions, sum(map(len, prompt_ids)), fields
