"""Tensors that are computed with but not trained: frozen parameters, and buffers."""

import contextlib
from collections.abc import Iterable, Iterator

import torch

from .layouts import Layout, layout_of


WORKING_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that weights are computed with


class FrozenTensors:
    """
    Tensors in the working dtype that never change. Where that rounds them, the originals are in host memory.

    Args:
        tensors (`Iterable[torch.Tensor]`):
            Parameters and buffers. Quantized ones stay as they are.
        dtype (`torch.dtype`, *optional*):
            The working dtype. `None` keeps each tensor's.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], dtype: torch.dtype | None):
        layouts = [layout_of(tensor) for tensor in tensors]
        self._dtype = dtype
        self._rounded = [
            (layout, self._round(layout))
            for layout in layouts
            if dtype is not None and layout.parameter.dtype in WORKING_DTYPES and layout.parameter.dtype != dtype
        ]
        self._partitioned = [layout for layout in layouts if not layout.in_parameter]

    def _round(self, layout: Layout) -> torch.Tensor:
        """Cast a tensor to the working dtype. Returns the original."""
        original = (layout.parameter.data if layout.in_parameter else layout.working()).cpu()
        layout.cast(self._dtype)
        return original

    def to_checkpoint_dtype(self) -> None:
        """Let the model have the originals. Partitioned tensors stay as they are."""
        for layout, original in self._rounded:
            if layout.in_parameter:
                layout.parameter.data = original.to(layout.parameter.device)

    def to_working_dtype(self) -> None:
        """Let the model compute in the working dtype again, with the values that its tensors have now."""
        self._rounded = [
            (layout, self._round(layout) if layout.in_parameter else original) for layout, original in self._rounded
        ]

    @contextlib.contextmanager
    def in_checkpoint_dtype(self) -> Iterator[None]:
        """Inside, the model has the originals. Partitioned tensors are empty, but of their dtype."""
        held = [(layout.parameter, layout.parameter.data) for layout, _ in self._rounded]
        for layout, original in self._rounded:
            data = layout.parameter.data
            layout.parameter.data = original if layout.in_parameter else data.to(original.dtype)
        try:
            yield
        finally:
            for tensor, data in held:
                tensor.data = data

    def hold(self) -> None:
        """Let partitioned tensors have all of their values. All processes call it together."""
        for layout in self._partitioned:
            layout.hold(layout.gather(layout.working()))

    def release(self) -> None:
        """Let partitioned tensors be empty again."""
        for layout in self._partitioned:
            layout.release()

    def collect(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The partitioned tensors, each with its original, whole. All processes go through them together."""
        originals = {layout: original for layout, original in self._rounded}
        for layout in self._partitioned:
            whole = layout.gather(originals.get(layout, layout.working()))
            yield layout.parameter, whole.view(layout.shape)
