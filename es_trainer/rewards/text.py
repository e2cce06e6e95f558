def completion_text(completion: str | list[dict[str, str]]) -> str:
    """
    Plain text of a completion in either of TRL's formats.

    Args:
        completion (`str` or `list[dict[str, str]]`):
            Completion in the standard format (a string) or in the conversational format (a list with one assistant
            message).

    Returns:
        `str`:
            The string itself, or the content of the assistant message.
    """
    return completion if isinstance(completion, str) else completion[0]["content"]
