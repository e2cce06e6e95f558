"""What all texts begin with, such as a system prompt, which is read once and not for each of them."""

LEAST_SAVED = 256  # tokens that it has to save: a forward pass over fewer takes hardly less time


def shared_prefix(texts: list[list[int]], members: list[int]) -> list[int]:
    """
    The tokens that all texts begin with.

    Args:
        texts (`list[list[int]]`):
            Tokens of each text.
        members (`list[int]`):
            Member that reads each text. Members have different weights, so each has to read the tokens.

    Returns:
        `list[int]`: the tokens, fewer than those of the shortest text. None if that would not save `LEAST_SAVED`.
    """
    different = {(member, tuple(text)) for text, member in zip(texts, members, strict=True)}
    saved = len(different) - len(set(members))  # readings of each token
    if saved == 0:
        return []
    # Whatever the first and the last in alphabetical order share, all do
    first, last = min(texts), max(texts)
    most = min(map(len, texts)) - 1
    length = next((i for i in range(most) if first[i] != last[i]), most)
    return first[:length] if saved * length >= LEAST_SAVED else []
