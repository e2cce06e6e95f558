"""The checksum that proves that two processes, or a server and its trainer, have the same weights."""

import pytest
import torch
from torch import nn

from es_trainer.noise import noise
from es_trainer.weights.checksum import checksum
from es_trainer.weights.store import Weights


def weights(size: int = 1000, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)


def slow_checksum(values: torch.Tensor, start: int = 0) -> int:
    total, mask = 0, 2**64 - 1
    for i, bits in enumerate(values.view(torch.int32).tolist(), start):
        x = i * 0x9E3779B97F4A7C15 & mask
        x ^= (x - 2**64 if x >= 2**63 else x) >> 32 & mask  # of a signed number
        total += (x * 0xBF58476D1CE4E5B9 | 1) * bits
    return total & mask


def test_it_is_what_it_is_called():
    assert checksum(weights()) == slow_checksum(weights())
    assert checksum(weights(), start=2**40 + 3) == slow_checksum(weights(), start=2**40 + 3)


def test_equal_values_do_not_cancel():
    found = [checksum(torch.full((64,), value)) for value in (0.0, 1.0, 1.5, -1.0, 64.0)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_order_counts(dtype):
    values = weights(dtype=dtype)
    found = {checksum(values), checksum(values.roll(500)), checksum(values.roll(1)), checksum(values.flip(0))}
    assert len(found) == 4
    neighbours = values.clone()
    neighbours[[10, 11]] = values[[11, 10]]
    assert checksum(neighbours) not in found


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int16)])
def test_each_bit_counts(dtype, bits):
    values, size = weights(50, dtype), dtype.itemsize * 8
    found = {checksum(values)}
    for index in range(50):
        for bit in range(size):
            flipped = values.clone()
            flipped.view(bits)[index] ^= torch.tensor(1).bitwise_left_shift(bit).to(bits)
            found.add(checksum(flipped))
    assert len(found) == 1 + 50 * size


def test_signs_of_two_weights_count():
    values = weights(64)
    found = {checksum(values)}
    for i in range(64):
        for j in range(i):
            flipped = values.clone()
            flipped[[i, j]] *= -1
            found.add(checksum(flipped))
    assert len(found) == 1 + 64 * 63 // 2


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
def test_slices_of_any_size_add_up(monkeypatch, piece):
    whole = checksum(weights())
    monkeypatch.setattr(noise, "CPU_PIECE", piece)
    assert checksum(weights()) == whole
    parts = [checksum(part, 300 * i) for i, part in enumerate(weights().split(300))]
    assert sum(parts) % 2**64 == whole


def test_of_weights():
    parameters = {"matrix": nn.Parameter(torch.ones(8, 8)), "nothing": nn.Parameter(torch.empty(0))}
    trained = Weights(parameters.items(), torch.bfloat16)
    assert trained.checksums() == [checksum(torch.ones(64)), 0]
    in_place = Weights({"matrix": nn.Parameter(torch.ones(8, 8))}.items(), torch.bfloat16, master_weights="none")
    assert in_place.checksums() == [checksum(torch.ones(64).bfloat16())]
