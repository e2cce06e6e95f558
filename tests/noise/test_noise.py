"""The noise contract on CPU: its words, its layout, its distribution, and that only seed, name and index count."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from es_trainer.noise import cpu, noise


NAME = "model.layers.0.mlp.down_proj.weight"
SIZE = 1 << 22
MASK = 0xFFFFFFFF

# Counter, key and output of Philox4x32-10 in the known-answer tests of Random123
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexadecimal(words: str) -> list[int]:
    return [int(word, 16) for word in words.split()]


def slow_philox(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def slow_words(seed: int, stream: int, counter: int) -> list[int]:
    return slow_philox([counter & MASK, counter >> 32, stream & MASK, stream >> 32], [seed & MASK, seed >> 32])


def slow_box_muller(w0: int, w1: int) -> tuple[float, float]:
    u = float(np.float32(w0 // 256) + np.float32(0.5)) / 2**24  # as float32 rounds it: near 1 it matters
    radius = math.sqrt(-2 * math.log(u)) * (-1 if w1 & 2**31 else 1)
    x = w1 % 2**30  # the angle, in quarters of the circle times 2**30, from -1/2 to 1/2
    angle = (x if x < 2**29 else x - 2**30) / 2**30 * math.pi / 2
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    return (sin, cos) if w1 & 2**30 else (cos, sin)


def slow_noise(seed: int, name: str, index: int) -> float:
    block, place = divmod(index, 4096)
    quarter, lane = divmod(place, 1024)
    words = slow_words(seed, noise.stream(name), block * 1024 + lane)
    return slow_box_muller(*(words[:2] if quarter < 2 else words[2:]))[quarter % 2]


def words_of_counter(seed: int, stream: int, counter: int) -> list[int]:
    block, lane = divmod(counter, 1024)
    words = np.empty((4, 512), np.uint64)
    cpu.block_words(np.uint64(block), np.uint64(stream), np.uint64(seed), words)
    return words.view(np.uint32)[:, lane].tolist()


def fill(size: int, seed: int = 1, start: int = 0, name: str = NAME) -> torch.Tensor:
    return noise.fill(torch.full((size,), torch.nan), name, seed, start)


def weights(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_known_answers(counter, key, answer):
    counter, key, answer = hexadecimal(counter), hexadecimal(key), hexadecimal(answer)
    assert slow_philox(counter, key) == answer
    words = cpu.philox(*(np.uint64(word) for word in counter + key))
    assert [int(word) & MASK for word in words] == answer


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_counter_and_key_of_a_block(counter, key, answer):
    (c0, c1, c2, c3), (k0, k1) = hexadecimal(counter), hexadecimal(key)
    assert words_of_counter(k0 | k1 << 32, c2 | c3 << 32, c0 | c1 << 32) == hexadecimal(answer)


def test_words_of_random_counters():
    generator = np.random.default_rng(0)
    for _ in range(100):
        seed, stream, counter = (int(word) for word in generator.integers(0, 2**64, 3, dtype=np.uint64))
        assert words_of_counter(seed, stream, counter) == slow_words(seed, stream, counter)


def test_box_muller_at_the_edges():
    heights = [0, 255, 256, 2**31 - 1, 2**31, 0xB504F333, 0xB504F400, 2**32 - 257, 2**32 - 256, 2**32 - 1]
    angles = [corner + offset & MASK for corner in range(0, 2**32, 2**29) for offset in (-1, 0, 1, 2**28)]
    for w0 in heights:
        for w1 in angles:
            normals = cpu.box_muller(np.uint32(w0), np.uint32(w1))
            assert normals == pytest.approx(slow_box_muller(w0, w1), rel=0, abs=1e-6)


@pytest.mark.parametrize("start", [0, 123457, 2**31 - 50000, 2**34 - 50000, 2**53 + 1])
@pytest.mark.parametrize("seed, name", [(0, "w"), (2**40 + 3, "lm_head.weight"), (2**63 - 1, NAME)])
def test_noise_is_the_contracts(seed, name, start):
    values = fill(100000, seed, start, name).numpy()
    for i in np.random.default_rng(0).integers(0, 100000, 300).tolist():
        assert abs(values[i] - slow_noise(seed, name, start + i)) < 1e-6


def test_stream_is_the_same_in_every_run():
    assert noise.stream("model.embed_tokens.weight") == 0xF64261A496B5D16A


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    return fill(SIZE, seed=2024).double().numpy()


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard errors."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) * math.sqrt(a.size)


def test_moments(normals):
    errors = {
        "mean": normals.mean() * math.sqrt(SIZE),
        "variance": ((normals**2).mean() - 1) * math.sqrt(SIZE / 2),
        "skewness": stats.skew(normals) * math.sqrt(SIZE / 6),
        "kurtosis": stats.kurtosis(normals) * math.sqrt(SIZE / 24),
    }
    assert all(abs(error) < 4 for error in errors.values()), errors


def test_distribution(normals):
    assert stats.kstest(normals[: 1 << 20], "norm").pvalue > 0.01


@pytest.mark.parametrize("sign", [-1, 1])
def test_tails(normals, sign):
    for bound in (3.0, 4.0):
        expected = SIZE * stats.norm.sf(bound)
        assert abs((sign * normals > bound).sum() - expected) < 4 * math.sqrt(expected)
    assert 4.7 < (sign * normals).max() < 5.9


@pytest.mark.parametrize("other", [{"seed": 2025}, {"seed": 2024 + 2**32}, {"seed": 2024, "name": NAME + "s"}])
def test_no_correlation_between_seeds_or_names(normals, other):
    others = fill(SIZE, **other).double().numpy()
    assert abs(correlation(normals, others)) < 4
    assert abs(correlation(normals**2, others**2)) < 4


@pytest.mark.parametrize("lag", [*range(1, 9), 1024, 2048, 3072, 4096])
def test_no_correlation_between_neighbours(normals, lag):
    assert abs(correlation(normals[:-lag], normals[lag:])) < 4
    assert abs(correlation(normals[:-lag] ** 2, normals[lag:] ** 2)) < 4


def test_no_correlation_within_a_counter(normals):
    quarters = normals.reshape(-1, 4, 1024).swapaxes(0, 1)
    for i in range(4):
        for j in range(i):
            assert abs(correlation(quarters[i], quarters[j])) < 4
            assert abs(correlation(quarters[i] ** 2, quarters[j] ** 2)) < 4


@pytest.mark.parametrize("start", [0, 2**33 + 1234])
def test_any_slice_is_that_of_the_whole(start):
    whole = fill(100000, start=start)
    generator = np.random.default_rng(0)
    for longest in [1] * 50 + [10, 5000, 100000] * 20:
        low = int(generator.integers(0, 100000))
        high = min(low + int(generator.integers(1, longest + 1)), 100000)
        assert torch.equal(fill(high - low, start=start + low), whole[low:high])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    source = weights(3000001)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            target = torch.empty_like(source, dtype=dtype)
            noise.add(source, target, NAME, [1, 2], [0.1, 0.2], start=5)
            results.append(target)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [0, 1234])
def test_in_place_is_out_of_place(dtype, start):
    source = weights(100001, dtype)
    target = torch.empty_like(source)
    noise.add(source, target, NAME, [1, 2], [0.1, -0.2], start)
    noise.add(source, source, NAME, [1, 2], [0.1, -0.2], start)
    assert torch.equal(source, target)


def test_sum_over_members():
    source = weights(100001)
    target = torch.empty_like(source)
    seeds, coefficients = [3, 2**35, 7, 7], [0.5, -0.25, 1e-3, 2.0]
    noise.add(source, target, NAME, seeds, coefficients, start=77)
    expected = source.double()
    for seed, coefficient in zip(seeds, coefficients, strict=True):
        expected += coefficient * fill(100001, seed, 77).double()
    torch.testing.assert_close(target.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sum_is_rounded_once(dtype):
    source = weights(100001)
    exact, rounded = torch.empty_like(source), torch.empty_like(source, dtype=dtype)
    for target in (exact, rounded):
        noise.add(source, target, NAME, [1, 2], [0.1, 0.2], start=5)
    assert torch.equal(rounded, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_source_of_another_dtype(dtype):
    source = weights(100001, dtype)
    results = [torch.empty(100001), torch.empty(100001)]
    for base, target in zip((source, source.float()), results, strict=True):
        noise.add(base, target, NAME, [1], [0.1], start=5)
    assert torch.equal(*results)


def test_empty_tensor():
    assert fill(0, start=5).numel() == 0


def test_unknown_device():
    with pytest.raises(ValueError, match="meta.*'cpu' and 'cuda' only"):
        noise.fill(torch.empty(8, device="meta"), NAME, 1)
