"""Masters in host memory, with a stand-in for the CUDA functions that lock it."""

import gc

import pytest
import torch

from es_trainer.weights.pinned import PinnedMemory


class Cudart:
    def __init__(self, status: int = 0):
        self.status = status
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 0
        self.locked[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def test_memory_is_locked_in_the_size_asked_for(monkeypatch):
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    memory = PinnedMemory()
    sizes = [1, 1000, 2**20 + 1, 0, 3_000_000]  # powers of two above them would take 21 MB rather than 16.2
    tensors = [memory.empty((size,)) for size in sizes]
    assert list(cudart.locked.values()) == [4 * size for size in sizes if size]
    assert all(address % 4096 == 0 for address in cudart.locked)
    for tensor, size in zip(tensors, sizes, strict=True):
        assert tensor.shape == (size,) and tensor.dtype == torch.float32
        assert tensor.untyped_storage().nbytes() == 4 * size
        tensor.fill_(size)
    assert all((tensor == size).all() for tensor, size in zip(tensors, sizes, strict=True))
    del memory
    gc.collect()
    assert not cudart.locked
    assert tensors[1].sum() == 1_000_000  # unlocked, and still there


def test_copies_are_locked_where_a_gpu_reads_them(monkeypatch):
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    memory, original = PinnedMemory(), torch.arange(1000.0)
    copies = [memory.copy(original, torch.bfloat16, torch.device(kind)) for kind in ("cpu", "cuda")]
    assert cudart.locked == {copies[1].data_ptr(): 2000}
    for copied in copies:
        assert copied.device.type == "cpu" and torch.equal(copied, original.bfloat16())


def test_memory_that_cannot_be_locked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(status=2))
    with pytest.raises(RuntimeError, match=r"4000 bytes of host memory .*\(CUDA error 2\).*`ulimit -l`"):
        PinnedMemory().empty((1000,))
