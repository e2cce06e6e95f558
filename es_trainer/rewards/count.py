from .text import completion_text


def count_reward(completions: list[str | list[dict[str, str]]], count: list[int], **kwargs) -> list[float]:
    """
    Reward for the right number and nothing else. Blanks around it and a full stop behind it are allowed.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions to score, as plain strings or in the conversational format.
        count (`list[int]`):
            Dataset column with one number per completion.
        **kwargs:
            The other dataset columns and whatever else the trainer passes. Not used.

    Returns:
        `list[float]`:
            For each completion 1.0 if it is the number in digits, and 0.0 otherwise.
    """
    texts = [completion_text(completion).strip().removesuffix(".") for completion in completions]
    return [float(text == str(number)) for text, number in zip(texts, count, strict=True)]
