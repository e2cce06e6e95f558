"""Perturbed weights in 16 bits: rounded up or down at random, so that no noise is lost on average."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from es_trainer.evolution import Member
from es_trainer.noise import cpu, noise
from es_trainer.noise.shapes import Gaussian, LowRank
from es_trainer.weights.layouts import EngineWeights
from es_trainer.weights.part import Part
from es_trainer.weights.rounding import write_from_host
from es_trainer.weights.store import Weights


SIZE, SIGMA = 1 << 20, 1e-3
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def rounded(values: torch.Tensor, dtype: torch.dtype, start: int = 0, key: int = 0x0123456789ABCDEF) -> torch.Tensor:
    """A sum of nothing but the values."""
    target = torch.empty_like(values, dtype=dtype)
    noise.add(values, target, "weight", [1], [0.0], start, key)
    return target


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    nearest = torch.tensor(value).to(dtype)
    below = nearest if nearest.double() <= value else torch.nextafter(nearest, torch.tensor(-math.inf, dtype=dtype))
    above = torch.nextafter(below, torch.tensor(math.inf, dtype=dtype))
    return below.item(), above.item()


VALUES = [1.0, 1.001, -1.002, 0.9999, 3e-3, -0.017, 1234.5, 6.2e-5, 6.1e-5, 1e-5, -3.3e-7, 4e-8, 1e-9]


@HALVES
@pytest.mark.parametrize("value", VALUES)
def test_a_value_becomes_a_neighbour_and_keeps_its_mean(dtype, value):
    exact = torch.tensor(value).item()
    below, above = neighbours(exact, dtype)
    found = rounded(torch.full((SIZE,), value), dtype).double()
    assert set(found.unique().tolist()) <= {below, above}
    share = (exact - below) / (above - below)
    expected = math.sqrt(share * (1 - share) / SIZE)
    assert abs((found.mean().item() - below) / (above - below) - share) <= 4 * expected + 2**-13


@HALVES
def test_what_has_no_other_value_stays(dtype):
    exact = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    exact[:6] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-24])
    torch.testing.assert_close(rounded(exact, dtype).float(), exact, rtol=0, atol=0, equal_nan=True)
    assert math.copysign(1, rounded(exact, dtype)[1].item()) == -1


def test_float32_is_not_rounded():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(values, torch.float32), values)


def test_bits_of_the_rounding_are_uniform_and_independent():
    indices = np.arange(1 << 16, dtype=np.uint32)
    draws = {
        key: np.array([cpu.rounding_bits(i, np.uint64(key)) for i in indices], dtype=np.uint32)
        for key in (noise.rounding_key(1, "a"), noise.rounding_key(2, "a"), noise.rounding_key(1, "b"))
    }
    for bits in draws.values():
        for shift in range(32):
            assert abs(np.mean(bits >> shift & 1) - 0.5) < 4 * 0.5 / 256
        counts = np.bincount(bits >> 8 & 0xFF, minlength=256)
        assert ((counts - 256) ** 2 / 256).sum() < 350  # chi-squared with 255 degrees of freedom: 255 +- 23
        for lag in (1, 2, 1024, 4096):
            assert abs(np.corrcoef(bits[lag:], bits[:-lag])[0, 1]) < 4 / 256
    first, second, third = (bits.astype(float) for bits in draws.values())
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / 256 and abs(np.corrcoef(first, third)[0, 1]) < 4 / 256


def perturbed(dtype: torch.dtype, weight: float = 1.0, size: int = SIZE, **options) -> torch.Tensor:
    """What a member's weights are above the unperturbed ones."""
    parameter = nn.Parameter(torch.full((size,), weight))
    weights = Weights([("norm.weight", parameter)], dtype, **options)
    weights.perturb(Member(5), SIGMA)
    return parameter.data.double() - weight


@HALVES
def test_noise_of_weights_of_one_arrives(dtype):
    shift = perturbed(dtype)
    z = noise.fill(torch.empty(SIZE), "norm.weight", 5).double()
    # A rounding with steps of size s changes a value by sqrt(d * (s - d)), d being its distance to the step below
    last = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    step = torch.where(z < 0, last / 2, last)
    distance = torch.remainder(SIGMA * z, step)
    variance = (distance * (step - distance)).mean().item()
    error = math.sqrt(variance / SIZE)
    assert abs((shift - SIGMA * z).mean().item()) < 4 * error
    slope = (shift @ z / (z @ z)).item()
    assert abs(slope / SIGMA - 1) < 4 * error / SIGMA
    correlation = torch.corrcoef(torch.stack([shift, z]))[0, 1].item()
    assert correlation == pytest.approx(SIGMA / math.sqrt(SIGMA**2 + variance), abs=0.01)


@HALVES
def test_the_mean_over_members_is_the_member_itself(dtype):
    """Over many seeds with the same sum."""
    exact = torch.full((4096,), 1.0003)
    mean = sum(rounded(exact, dtype, key=noise.rounding_key(s, "w")).double() for s in range(2000)) / 2000
    below, above = neighbours(1.0003, dtype)
    share = (1.0003 - below) / (above - below)
    error = (mean - 1.0003) / (above - below) * math.sqrt(2000 / (share * (1 - share)))
    assert error.abs().max() < 5.5 and abs(error.mean()) < 4 / 64


@HALVES
@pytest.mark.parametrize("noises", [Gaussian(), LowRank(2)], ids=["gaussian", "low_rank"])
def test_any_slice_part_and_piece_gives_the_same_bits(monkeypatch, dtype, noises):
    shape, size = (500, 300), 150_000
    source = 1 + 0.1 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    key = noise.rounding_key(3, "weight")
    terms = noises.combine("weight", shape, [3], [SIGMA], source.device)
    whole = torch.empty(size, dtype=dtype)
    terms.add(source, whole, 0, key)
    nearest = torch.empty_like(whole)
    terms.add(source, nearest)
    assert not torch.equal(whole, nearest)
    for piece in (1000, 1 << 15):
        monkeypatch.setattr(noise, "CPU_PIECE", piece)
        for low, high in [(0, size), (1, 2), (777, 4097), (40_000, size)]:
            part = torch.empty(high - low, dtype=dtype)
            terms.add(source[low:high], part, low, key)
            assert torch.equal(part, whole[low:high])
        own = EngineWeights(Part("weight", torch.Size(shape), 30, 70, 300), torch.empty(500 * 70, dtype=dtype))
        parameter = nn.Parameter(source.view(shape).clone())
        weights = Weights([("weight", parameter)], dtype, perturbation=noises, engine_weights={parameter: own})
        weights.perturb(Member(3), SIGMA)
        assert torch.equal(own.weights, own.part.of(whole.view(shape)))


@HALVES
def test_weights_written_from_host_memory_have_the_same_bits(dtype):
    parameter = nn.Parameter(torch.randn(70_000, generator=torch.Generator().manual_seed(0)))
    weights = Weights([("norm.weight", parameter)], dtype, master_weights="host")
    weights.perturb(Member(5), SIGMA)
    (shard,) = weights.shards
    target = torch.empty_like(shard.working)
    terms = weights.weighted_sum(shard, [5], [SIGMA])
    write_from_host(shard.master, target, terms, noise.rounding_key(5, "norm.weight"))
    assert torch.equal(target, parameter.data)


@HALVES
def test_restored_and_in_place_weights_are_rounded_to_nearest(dtype):
    given = 1 + 0.1 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(given.clone())
    weights = Weights([("norm.weight", parameter)], dtype)
    weights.perturb(Member(5), SIGMA)
    weights.restore()
    assert torch.equal(parameter.data, given.to(dtype))
    in_place = nn.Parameter(given.clone())
    weights = Weights([("norm.weight", in_place)], dtype, master_weights="none")
    weights.perturb(Member(5), SIGMA)
    expected = given.to(dtype)
    noise.add(expected, expected, "norm.weight", [5], [SIGMA])
    assert torch.equal(in_place.data, expected)
