"""Checks of the Triton kernel, run by `test_cuda_kernel.py` in processes of their own.

On CPU tensors if Triton's interpreter is on, else on CUDA tensors.
"""

import functools
import math
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import Qwen2Config, Qwen2ForCausalLM

from es_trainer.evolution import EvolutionStrategy, Member
from es_trainer.noise import cuda, noise
from es_trainer.noise.jobs import Addition, Product
from es_trainer.noise.shapes import Gaussian, LowRank, LowRankSum


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
NAME = "model.layers.0.mlp.down_proj.weight"
STREAM = noise.stream(NAME)
TOLERANCE = 2e-6


def weights(size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def add(source, target, seeds, coefficients, start=0, stream=STREAM):
    """Run the kernel on copies on the device and return the result on CPU."""
    target = target.to(DEVICE)
    source = None if source is None else source.to(DEVICE)
    cuda.write_each([Addition(source, target, stream, seeds, coefficients, start)])
    return target.cpu()


def fill(size, seed=1, start=0, stream=STREAM):
    return add(None, torch.full((size,), torch.nan), [seed], [1.0], start, stream)


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("size", [1, 17, 4096, 10000])
@pytest.mark.parametrize("start", [0, 5, 4095, 4096, 123457])
def test_values_are_those_of_the_cpu(start, size):
    for name, seed in [("w", 0), ("lm_head.weight", 2**31 + 1), ("weight", 2**40 + 3), (NAME, 2**63 - 1)]:
        expected = noise.fill(torch.empty(size), name, seed, start)
        assert largest_difference(fill(size, seed, start, noise.stream(name)), expected) < TOLERANCE


@pytest.mark.parametrize("start", [2**31 - 100, 2**33 + 7, 2**34 - 2000, 2**50 + 12345])
def test_index_has_64_bits(start):
    expected = noise.fill(torch.empty(5000), NAME, 1, start)
    assert largest_difference(fill(5000, start=start), expected) < TOLERANCE


@pytest.mark.parametrize("bit", [0, 31, 32, 62])
def test_every_bit_of_the_seed_counts(bit):
    assert not torch.isclose(fill(64, seed=1 << bit), fill(64, seed=0)).any()


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_every_bit_of_the_stream_counts(bit):
    assert not torch.isclose(fill(64, stream=1 << bit), fill(64, stream=0)).any()


def test_sum_over_members():
    seeds, coefficients = [3, 2**35, 7, 7, 2**62], [0.5, -0.25, 1e-3, 2.0, -1.0]
    source = weights(10000)
    for base in (source, None):
        expected = torch.empty(10000)
        noise.add(base, expected, NAME, seeds, coefficients, start=77)
        assert largest_difference(add(base, torch.empty(10000), seeds, coefficients, 77), expected) < TOLERANCE


def test_float16_is_rounded_once():
    source = weights(5000)
    exact = add(source, torch.empty(5000), [1, 2], [0.1, 0.2])
    assert torch.equal(add(source, torch.empty(5000).half(), [1, 2], [0.1, 0.2]), exact.half())


def test_bfloat16_is_rounded_once():
    source = weights(5000)
    exact = add(source, torch.empty(5000), [1, 2], [0.1, 0.2])
    rounded = add(source, torch.empty(5000).bfloat16(), [1, 2], [0.1, 0.2])
    if INTERPRETED:  # which cuts the low bits off
        assert torch.equal(rounded.view(torch.int16), (exact.view(torch.int32) >> 16).to(torch.int16))
    else:
        assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_source_of_another_dtype(dtype):
    source = weights(5000).to(dtype)
    widened = add(source.float(), torch.empty(5000), [1], [0.1], 3)
    assert torch.equal(add(source, torch.empty(5000), [1], [0.1], 3), widened)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_place(dtype):
    source = weights(10000).to(dtype)
    target = source.to(DEVICE, copy=True)
    cuda.write_each([Addition(target, target, 99, [1, 2], [0.1, 0.2], 1234)])
    assert torch.equal(target.cpu(), add(source, torch.empty_like(source), [1, 2], [0.1, 0.2], 1234, stream=99))


def test_shards_make_the_whole():
    whole = fill(13000, start=1000)
    edges = [0, 1, 18, 3096, 3097, 7192, 13000]
    shards = [fill(high - low, start=1000 + low) for low, high in zip(edges, edges[1:], strict=False)]
    assert torch.equal(torch.cat(shards), whole)


def test_nothing_is_written_outside_the_shard():
    whole = torch.zeros(9000, device=DEVICE)
    cuda.write_each([Addition(None, whole[3000:6000], 1, [1], [1.0], 3000)])
    assert not whole[:3000].any() and whole[3000:6000].all() and not whole[6000:].any()


def test_empty_shard():
    assert fill(0, start=5).numel() == 0


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA tensors")
def test_noise_of_cuda_tensors():
    expected = noise.fill(torch.empty(10000), NAME, 1, 5)
    assert largest_difference(noise.fill(torch.empty(10000, device="cuda"), NAME, 1, 5).cpu(), expected) < TOLERANCE


# ---- stochastic rounding ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_that_of_the_cpu(dtype):
    source = torch.cat([weights(3000), 1e-5 * weights(3000), torch.tensor([math.inf, -math.inf, 0.0, 6.1e-5])])
    for start in (0, 77, 2**32 - 1000):
        expected, found = torch.empty_like(source, dtype=dtype), torch.empty_like(source, dtype=dtype, device=DEVICE)
        noise.add(source, expected, NAME, [1], [0.0], start, 2**63 + 12345)
        cuda.write_each([Addition(source.to(DEVICE), found, STREAM, [1], [0.0], start, 2**63 + 12345)])
        assert torch.equal(found.cpu(), expected)


# ---- products ----


def make_product(matrices, rows, columns, terms):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(matrices, rows, terms, generator=generator)
    return left, torch.randn(matrices, terms, columns, generator=generator)


def add_product(source, target, start, left, right, rounding=None):
    target = target.to(DEVICE)
    source = None if source is None else source.to(DEVICE)
    cuda.write_each([Product(source, target, left.to(DEVICE), right.to(DEVICE), start, rounding)])
    return target.cpu()


SHAPES = [(1, 60, 30, 5), (3, 30, 20, 1), (1, 1, 5000, 3), (1, 5000, 1, 2), (2, 70, 130, 4), (1, 33, 129, 7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_the_cpu(shape):
    left, right = make_product(*shape)
    size = left.shape[0] * left.shape[1] * right.shape[2]
    for source in (None, weights(size)):
        expected = torch.empty(size)
        LowRankSum(left, right).add(source, expected)
        found = add_product(source, torch.full((size,), torch.nan), 0, left, right)
        # The interpreter's multiply-adds are not fused
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if INTERPRETED else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_slice_of_a_product_is_that_of_the_whole(shape, dtype):
    left, right = make_product(*shape)
    size = left.shape[0] * left.shape[1] * right.shape[2]
    source = weights(size)
    whole = add_product(source, torch.empty(size, dtype=dtype), 0, left, right, rounding=99)
    for low, high in [(0, 1), (size - 1, size), (size // 3, 2 * size // 3), (17, size - 5), (0, size - 1)]:
        part = add_product(source[low:high], torch.empty(high - low, dtype=dtype), low, left, right, rounding=99)
        assert torch.equal(part, whole[low:high])


def test_product_in_place_and_nothing_outside():
    left, right = make_product(2, 70, 130, 4)
    whole = weights(2 * 70 * 130).to(DEVICE)
    before = whole.clone()
    expected = add_product(before[1000:9000], torch.empty(8000), 1000, left, right)
    part = whole[1000:9000]
    cuda.write_each([Product(part, part, left.to(DEVICE), right.to(DEVICE), 1000)])
    assert torch.equal(part.cpu(), expected)
    assert torch.equal(whole[:1000], before[:1000]) and torch.equal(whole[9000:], before[9000:])


# ---- many tensors at once ----


class Operations(TorchDispatchMode):
    """Counts what a GPU would be given to do: operations of torch that are more than another view, and launches."""

    def __init__(self, monkeypatch, run=True):
        super().__init__()
        self.launched = []
        self.run = run
        monkeypatch.setattr(noise, "_is_on_gpu", lambda target: True)
        for kernel in ("add_kernel", "product_kernel"):
            monkeypatch.setattr(cuda, kernel, self._counted(getattr(cuda, kernel), kernel))

    def _counted(self, kernel, name):
        class Counted:
            def __getitem__(_, grid):
                return functools.partial(self._launch, name, kernel[grid])

        return Counted()

    def _launch(self, name, launch, *args, **options):
        self.launched.append(name)
        if self.run:
            with _disable_current_modes():  # the interpreter's own
                launch(*args, **options)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in function.name() and not function.name().startswith("aten::detach"):
            self.launched.append(function.name())
        return function(*args, **(kwargs or {}))


def strategy(shape, layers) -> EvolutionStrategy:
    """Over all tensors of a Qwen2.5 model with so many layers, but small ones."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": 80, "tie_word_embeddings": False},
    )
    parameters = list(Qwen2ForCausalLM(config).named_parameters())
    return EvolutionStrategy(parameters, perturbation=shape, dtype=torch.bfloat16)


shapes = pytest.mark.parametrize("shape", [Gaussian(), LowRank(1)], ids=["gaussian", "low_rank"])


@pytest.mark.skipif(not INTERPRETED, reason="counts launches of the interpreter")
@shapes
def test_a_member_takes_few_launches(monkeypatch, shape):
    expected, found = strategy(shape, layers=2), strategy(shape, layers=2)
    expected.perturb(Member(5))
    with Operations(monkeypatch) as operations:
        found.perturb(Member(5))
    assert len(operations.launched) <= 8, operations.launched
    for shard, other in zip(found.weights.shards, expected.weights.shards, strict=True):
        # Another rounding of a sum may make another one of the rounding at random, in few of the values
        assert (shard.working == other.working).float().mean() > 0.98, shard.name
        torch.testing.assert_close(shard.working, other.working, rtol=2**-7, atol=1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="counts launches of the interpreter")
@shapes
def test_a_member_of_a_7b_model_takes_no_more(monkeypatch, shape):
    es = strategy(shape, layers=28)
    assert len(es.weights.shards) == 339
    with Operations(monkeypatch, run=False) as operations:
        es.perturb(Member(5))
    assert len(operations.launched) <= 8, operations.launched


@pytest.mark.skipif(not INTERPRETED, reason="counts launches of the interpreter")
def test_all_factors_of_a_population_are_drawn_in_one_launch(monkeypatch):
    members = [Member(5), Member(6, -1), Member(7)]
    expected, weights = strategy(LowRank(1), 2).weights, strategy(LowRank(1), 2).weights
    with Operations(monkeypatch) as operations:
        found = list(weights.all_of_members(members, 0.1))
    of_factors, of_vectors = (name for name in operations.launched if name.endswith("_kernel"))
    assert of_factors == of_vectors == "add_kernel"
    for (_, values), shard in zip(found, expected.shards, strict=True):
        other = expected.of_members(shard, members, 0.1)
        if isinstance(values, torch.Tensor):
            torch.testing.assert_close(values, other, rtol=0, atol=2e-6)
        else:
            torch.testing.assert_close(values.left, other.left, rtol=2**-7, atol=1e-6)
            torch.testing.assert_close(values.right, other.right, rtol=2**-7, atol=1e-6)
