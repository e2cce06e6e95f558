"""Page-locked host memory, from which a GPU copies without waiting."""

import mmap
import weakref
from collections.abc import Sequence

import torch


class PinnedMemory:
    """
    Makes tensors in page-locked memory of just their size. Torch's own pinned memory comes in blocks of powers
    of two, which would take nearly twice the memory for some models.

    The memory is unlocked when this object goes, and freed when the tensors go.
    """

    def __init__(self):
        self._locked: list[int] = []
        weakref.finalize(self, _unlock, self._locked)

    def copy(self, tensor: torch.Tensor, dtype: torch.dtype, reader: torch.device) -> torch.Tensor:
        """A copy in host memory, which is page-locked if the device that will read it is a GPU."""
        if reader.type == "cuda":
            return self.empty(tensor.shape, dtype).copy_(tensor)
        return torch.empty(tensor.shape, dtype=dtype, device="cpu").copy_(tensor)

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """
        An uninitialized tensor.

        Raises:
            `RuntimeError`: If the memory cannot be locked.
        """
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        if tensor.numel() == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        # Whole pages that nothing else lies in
        pages = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(pages, dtype=dtype).view(shape)
        status = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        if status != 0:
            raise RuntimeError(
                f"{tensor.nbytes} bytes of host memory could not be locked for `master_weights='host'` or "
                f"`anchor_weights='host'` (CUDA error {status}). Raise the limit of locked memory (`ulimit -l`), or "
                "choose another value."
            )
        self._locked.append(tensor.data_ptr())
        return tensor


def _unlock(addresses: list[int]) -> None:
    for address in addresses:
        torch.cuda.cudart().cudaHostUnregister(address)
