"""What methods of vLLM's workers have in common that a trainer in another process calls."""

import functools
import traceback
from collections.abc import Callable
from typing import Any

import torch

from ..run.history import working_dtype


class NotBegun(RuntimeError):
    """A method was called that needs a run."""


def reported(method: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Return an error instead of raising it, after which the queues between vLLM's processes would not be usable."""

    @functools.wraps(method)
    def call(*args: Any) -> dict[str, Any]:
        try:
            return method(*args)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}

    return call


def require_dtype(dtype: torch.dtype, config: dict[str, Any], given: str) -> None:
    """
    Args:
        dtype (`torch.dtype`):
            What the server computes in.
        config (`dict[str, Any]`):
            What `run_config` returned.
        given (`str`):
            The dtype in which the model is given, like `"float32"`.

    Raises:
        `ValueError`: If the run computes in another dtype.
    """
    wanted = str(working_dtype(config) or given).removeprefix("torch.")
    if str(dtype) != f"torch.{wanted}":
        raise ValueError(
            f"The server computes in {dtype}, but the run in {wanted}. Start the server with --dtype {wanted}, or "
            "choose with `bf16` and `fp16` of `ESConfig`."
        )
