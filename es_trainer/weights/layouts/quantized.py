"""Parameters whose working weights are stored in 8 bits, in the modules that compute with them."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..codecs import Codec
from ..part import Part
from ..quantized import QuantizedMatrix
from .layout import Layout


class Quantized(Layout):
    """
    Modules have a quantized matrix in place of the parameter, whose own data are empty.

    Args:
        parameter (`nn.Parameter`):
            A matrix with the weights as they are given, on any device.
        owners (`Sequence[tuple[nn.Module, str]]`):
            The modules that compute with it, and the attribute under which each has it.
        codec ([`Codec`]):
            Makes 8 bits of a number.
        dtype (`torch.dtype`):
            The dtype to compute in.
        device (`torch.device`):
            Where to compute.
    """

    in_place = True
    in_parameter = False
    quantized = True

    def __init__(
        self,
        parameter: nn.Parameter,
        owners: Sequence[tuple[nn.Module, str]],
        codec: Codec,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__(parameter)
        self._owners = owners
        self._original: torch.Tensor | None = parameter.data.contiguous()
        self._matrix = QuantizedMatrix.of(codec, self._original, dtype, device)
        parameter.data = torch.empty(0, dtype=dtype, device=device)
        for module, attribute in owners:
            # An attribute of the instance goes before a parameter of the same name
            vars(module)[attribute] = self._matrix

    @property
    def shape(self) -> torch.Size:
        return self._matrix.shape

    @property
    def computed(self) -> torch.Tensor:
        return self._matrix

    def part(self, name: str) -> Part:
        return Part.whole(name, self.shape)

    def original(self) -> torch.Tensor:
        """
        Raises:
            `RuntimeError`: At the second call, as they are not kept.
        """
        if self._original is None:
            raise RuntimeError("The original weights of a quantized parameter were taken already.")
        original, self._original = self._original, None
        return original.view(-1)

    def working(self) -> torch.Tensor:
        return self._matrix

    def cast(self, dtype: torch.dtype) -> None:
        """Without effect: the matrix was made for the working dtype."""

    @contextlib.contextmanager
    def rewritten(self, working: torch.Tensor) -> Iterator[torch.Tensor]:
        values = torch.empty(working.numel(), dtype=torch.float32, device=working.device)
        yield values
        self._matrix.copy_(values)

    def computes_with(self, working: torch.Tensor) -> bool:
        return all(vars(module).get(attribute) is working for module, attribute in self._owners)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values
