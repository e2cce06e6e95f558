"""Matrices that are stored in 8 bits and computed with in the working dtype."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..noise import noise
from ..noise.shapes import Sum
from .codecs import Codec
from .metadata import METADATA


class QuantizedMatrix(torch.Tensor):
    """
    A matrix that takes a byte a number.

    Modules use it like a weight of the working dtype, which it is to everything that asks for shape, dtype or device.
    Linear layers and embeddings compute with it, `copy_` quantizes new values, and nothing else uses it.

    Attributes:
        codec ([`Codec`]):
            Makes codes of numbers.
        codes (`torch.Tensor` of shape `(rows, columns)`):
            The numbers, divided by the scales of their rows.
        scales (`torch.Tensor` of shape `(rows, 1)`):
            In float32.
        added ([`Sum`], *optional*):
            A perturbation with which the matrix is computed with until it has new values. It is drawn anew for each
            use, which takes long, and memory for this matrix only.
    """

    codec: Codec
    codes: torch.Tensor
    scales: torch.Tensor
    added: Sum | None

    @classmethod
    def of(cls, codec: Codec, values: torch.Tensor, dtype: torch.dtype, device: torch.device) -> "QuantizedMatrix":
        """
        Quantize a matrix.

        Args:
            codec ([`Codec`]):
                How.
            values (`torch.Tensor` of shape `(rows, columns)`):
                Its numbers, on any device.
            dtype (`torch.dtype`):
                The dtype to compute in.
            device (`torch.device`):
                Where to compute.
        """
        # One number for all, which spoils what would compute with it
        self = torch.full((), math.nan, dtype=dtype, device=device).expand(values.shape).as_subclass(cls)
        self.codec, self.added = codec, None
        self.codes = torch.empty(values.shape, dtype=codec.dtype, device=device)
        self.scales = torch.empty(len(values), 1, dtype=torch.float32, device=device)
        return self.copy_(values)

    def perturbation(self) -> torch.Tensor | None:
        """What is added to the matrix, in the working dtype."""
        if self.added is None:
            return None
        values = torch.empty(self.numel(), dtype=torch.float32, device=self.device)
        noise.for_pieces(lambda low, high: self.added.add(None, values[low:high], low), len(values), values.device)
        return values.view(self.shape).to(self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Memory of the matrix."""
        return self.codes.nbytes + self.scales.nbytes

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in USES:
            return USES[func](*args, **kwargs)
        if func not in METADATA:
            raise TypeError(
                f"`{func.__name__}` of a weight that is stored in 8 bits (`weight_quantization`) is not known: linear "
                "layers and embeddings compute with such weights. Set weight_quantization=None for this model."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


# Their arguments have the names that torch gives them: modules may pass them by keyword


def _linear(input: torch.Tensor, weight: QuantizedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    # Codes are exact in 16 bits, and scales multiply sums, so that only the sums are rounded
    out = F.linear(input, weight.codes.to(input.dtype)).mul_(weight.scales[:, 0])
    if (added := weight.perturbation()) is not None:
        out += F.linear(input, added)
    return out if bias is None else out.add_(bias)


def _embedding(input: torch.Tensor, weight: QuantizedMatrix, *args: Any, **kwargs: Any) -> torch.Tensor:
    # As bytes: not all dtypes of 8 bits can be indexed
    codes = weight.codes.view(torch.uint8)[input].view(weight.codec.dtype)
    out = codes.to(weight.dtype).mul_(weight.scales[input])
    if (added := weight.perturbation()) is not None:
        out += F.embedding(input, added)
    return out


def _copy(self: QuantizedMatrix, src: torch.Tensor) -> QuantizedMatrix:
    self.added = None
    self.codec.encode(src.view(self.shape), self.codes, self.scales)
    return self


def _largest(x: QuantizedMatrix, ord: float) -> torch.Tensor:
    """The norm of order infinity: in every row, a number has the largest code."""
    if ord != math.inf:
        raise TypeError(f"Of a weight that is stored in 8 bits, the norm of order {ord} is not known.")
    return x.scales.amax() * x.codec.largest


USES: dict[Callable, Callable] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.Tensor.copy_: _copy,
    torch.linalg.vector_norm: _largest,
}
