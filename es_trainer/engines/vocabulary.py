"""Tokens that a model and its tokenizer have to agree on."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..weights.layouts.zero3 import whole_shape


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a processor, or the tokenizer that it is.

    Raises:
        `TypeError`: If it is neither.
    """
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        kind = type(processing_class).__name__
        raise TypeError(f"`processing_class` must be a tokenizer or a processor, but is a {kind}.")
    return tokenizer


def require_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the end-of-sequence token the padding token of a tokenizer that has none."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "The tokenizer has neither a padding nor an end-of-sequence token. Set `tokenizer.pad_token` and "
                "`tokenizer.eos_token` to tokens of its vocabulary."
            )
        tokenizer.pad_token = tokenizer.eos_token


def embedding_rows(model: PreTrainedModel) -> int:
    """Number of tokens that the model has an embedding for."""
    return whole_shape(model.get_input_embeddings().weight)[0]


def check_token_ids(rows: int, tokenizer: PreTrainedTokenizerBase, ids: list[int], what: str) -> None:
    """
    Raises:
        `ValueError`: If a token is beyond the embedding's rows, as those that were added to the tokenizer alone are.
    """
    if ids and max(ids) >= rows:
        raise ValueError(
            f"{what} {tokenizer.convert_ids_to_tokens(max(ids))!r} with the id {max(ids)}, but the model's embedding "
            f"has {rows} rows. Give the model's own tokenizer as `processing_class`, or call "
            "`model.resize_token_embeddings(len(tokenizer))` and give that model."
        )


def check_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        `ValueError`: If the model has no embedding for a token that the trainer itself adds or waits for.
    """
    rows = embedding_rows(model)
    for name in ("pad_token", "eos_token"):
        token = tokenizer.convert_tokens_to_ids(getattr(tokenizer, name))
        check_token_ids(rows, tokenizer, [token] if token is not None else [], f"`tokenizer.{name}` is")
