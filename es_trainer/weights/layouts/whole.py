"""Every process has all weights of a parameter, in the parameter itself."""

import torch

from ..part import Part
from .layout import Layout, same_memory


class Whole(Layout):
    """The parameter's data are its weights."""

    in_parameter = True

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    def part(self, name: str) -> Part:
        return Part.whole(name, self.shape)

    def original(self) -> torch.Tensor:
        return self.parameter.data.contiguous().view(-1)

    def working(self) -> torch.Tensor:
        return self.parameter.data.view(-1)

    def cast(self, dtype: torch.dtype) -> None:
        self.parameter.data = self.parameter.data.to(dtype).contiguous()

    def computes_with(self, working: torch.Tensor) -> bool:
        return same_memory(self.parameter.data, working)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values
