"""Completions by a function of the user, in TRL's protocol."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import Trainer

from ..copies import own_copy
from ..rollout import Completion
from .results import Answer


RolloutFunc = Callable[[list[Any], Trainer], dict[str, Any]]


def call_rollout_func(rollout_func: RolloutFunc, prompts: list[Any], trainer: Trainer, num_generations: int) -> Answer:
    """
    Let a function generate the completions.

    A function may follow TRL's documentation, by which it gets each prompt once and returns all of its completions, or
    TRL's code, by which it returns one completion for each prompt that it gets. What it returns tells.

    Args:
        rollout_func (`Callable`):
            Called with the prompts, once each, and the trainer. If it returns one completion for each, it is called
            again with the prompts as often as completions are missing.
        prompts (`list`):
            Texts or lists of messages; the function gets copies.
        trainer ([`ESTrainer`]):
            Its model has the weights to generate with.
        num_generations (`int`):
            Completions that there have to be for each prompt.

    Returns:
        `tuple`: The completions, the number of tokens of each one's prompt, and what else the function returned about
        each.

    Raises:
        `ValueError`: If the function does not return what it should.
        `RuntimeError`: If it exits.
    """
    trainer.model.eval()  # no dropout
    output = _call(rollout_func, prompts, trainer, {len(prompts), len(prompts) * num_generations})
    if len(output["completion_ids"]) < len(prompts) * num_generations:
        missing = num_generations - 1
        repeated = [prompt for prompt in prompts for _ in range(missing)]
        others = _call(rollout_func, repeated, trainer, {len(repeated)})
        if others.keys() != output.keys():
            raise ValueError(
                f"`rollout_func` returned {sorted(output)}, but {sorted(others)} when it was called again."
            )
        output = {key: _interleaved(output[key], others[key], missing) for key in output}
    prompt_ids, completion_ids = output.pop("prompt_ids"), output.pop("completion_ids")
    for name in ("logprobs", "logprob_token_ids"):  # for policy gradients
        output.pop(name, None)
    masks = output.pop("env_mask", None) or [[1] * len(ids) for ids in completion_ids]
    ends = {*trainer.engine.eos_token_ids, trainer.engine.tokenizer.pad_token_id}
    completions = []
    for row, (ids, mask) in enumerate(zip(completion_ids, masks, strict=True)):
        ids = list(map(int, ids))
        if not ids:
            raise ValueError(f"`rollout_func` returned no tokens in 'completion_ids' for completion {row}.")
        text = trainer.engine.tokenizer.decode(ids, skip_special_tokens=True)
        completions.append(Completion(ids, text, ids[-1] not in ends, len(mask) - sum(mask)))
    fields = [
        {key: None if values is None else values[row] for key, values in output.items()}
        for row in range(len(completions))
    ]
    return completions, list(map(len, prompt_ids)), fields


def _call(rollout_func: RolloutFunc, prompts: list[Any], trainer: Trainer, numbers: set[int]) -> dict[str, Any]:
    """What the function returns, with as many entries as one of `numbers` in each field."""
    try:
        output = dict(rollout_func(own_copy(prompts), trainer))
    except SystemExit as error:  # which would end training as if it were done
        raise RuntimeError(f"`rollout_func` raised SystemExit: {error}") from error
    missing = {"prompt_ids", "completion_ids"} - output.keys()
    if missing:
        raise ValueError(f"`rollout_func` must return {sorted(missing)} in its dict, which has {sorted(output)}.")
    found = {key: len(values) for key, values in output.items() if values is not None}
    for key, number in found.items():
        if number not in numbers or number != found["prompt_ids"]:
            raise ValueError(
                f"`rollout_func` returned {number} entries in {key!r} for {len(prompts)} prompts: there must be "
                f"{' or '.join(map(str, sorted(numbers)))}, and as many in each field."
            )
    return output


def _interleaved(first: Sequence[Any] | None, others: Sequence[Any] | None, number: int) -> list[Any] | None:
    """One entry of the first for each prompt, and `number` of the others."""
    if first is None or others is None:
        return None
    return [entry for i, own in enumerate(first) for entry in (own, *others[i * number : (i + 1) * number])]
