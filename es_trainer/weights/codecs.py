"""How the numbers of a matrix are stored in 8 bits: a scale for each row, and codes."""

from abc import ABC, abstractmethod

import torch

from ..choices import WeightQuantization


BLOCK = 1 << 22  # numbers that are encoded at once, for which memory is needed


class Codec(ABC):
    """Symmetric quantization by rows: a number is its code times the scale of its row."""

    dtype: torch.dtype  # of codes
    largest: float  # code

    @abstractmethod
    def round(self, values: torch.Tensor) -> torch.Tensor:
        """Codes of values between `-largest` and `largest`."""

    def encode(self, values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """
        Store a matrix.

        Args:
            values (`torch.Tensor` of shape `(rows, columns)`):
                Its numbers, on any device.
            codes (`torch.Tensor` of shape `(rows, columns)`):
                Takes the codes.
            scales (`torch.Tensor` of shape `(rows, 1)`):
                Takes the scales, in float32.
        """
        at_once = max(1, BLOCK // values.shape[1])
        for some, own, scale in zip(*(t.split(at_once) for t in (values, codes, scales)), strict=True):
            some = some.to(codes.device, torch.float32)
            torch.amax(some.abs(), dim=1, keepdim=True, out=scale).div_(self.largest)
            # A row of zeros has a scale of 0, whatever its codes
            own.copy_(self.round(some / torch.where(scale == 0, 1.0, scale)))


class Int8(Codec):
    """Whole numbers from -127 to 127: the step between two numbers of a row is its largest one divided by 127."""

    dtype = torch.int8
    largest = 127.0

    def round(self, values):
        return values.round_()


class FP8(Codec):
    """Floating point numbers with 4 bits of exponent and 3 of mantissa: steps are proportional to the numbers."""

    dtype = torch.float8_e4m3fn
    largest = torch.finfo(torch.float8_e4m3fn).max

    def round(self, values):
        # Rounding of the quotient may have gone beyond the largest code, which would be NaN
        return values.clamp_(-self.largest, self.largest)


CODECS: dict[WeightQuantization, Codec] = {"int8": Int8(), "fp8": FP8()}
