from .text import completion_text


def conciseness_reward(completions: list[str | list[dict[str, str]]], answer: list[str], **kwargs) -> list[float]:
    """
    Reward that asks for completions as long as a reference answer: minus the difference of their lengths, in
    characters. The best reward is 0.0. Only lengths count, so this teaches brevity and not correctness.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions to score, as plain strings or in the conversational format.
        answer (`list[str]`):
            Dataset column with one reference answer per completion.
        **kwargs:
            The other dataset columns and whatever else the trainer passes. Not used.

    Returns:
        `list[float]`:
            One reward per completion, 0.0 or less.
    """
    return [
        -float(abs(len(completion_text(completion)) - len(reference)))
        for completion, reference in zip(completions, answer, strict=True)
    ]
