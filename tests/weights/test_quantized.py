"""Matrices in 8 bits: codecs by their arithmetic, and what modules compute with them."""

import math

import pytest
import torch
import torch.nn.functional as F

from es_trainer.noise.shapes import LowRank
from es_trainer.weights.codecs import BLOCK, CODECS
from es_trainer.weights.quantized import QuantizedMatrix


CPU = torch.device("cpu")


def matrix(kind: str, values: torch.Tensor, dtype=torch.float32) -> QuantizedMatrix:
    return QuantizedMatrix.of(CODECS[kind], values, dtype, CPU)


def decoded(quantized: QuantizedMatrix) -> torch.Tensor:
    return quantized.codes.double() * quantized.scales.double()


@pytest.fixture
def values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    # Rows of different sizes, which would spoil one another with one scale for all
    return torch.randn(37, 64, generator=generator) * torch.logspace(-4, 3, 37)[:, None]


def test_int8_rounds_to_the_nearest_multiple_of_a_127th_of_the_largest_number_of_the_row(values):
    steps = values.double().abs().amax(1, keepdim=True) / 127
    error = (decoded(matrix("int8", values)) - values.double()).abs() / steps
    assert error.max() <= 0.5 + 1e-5
    assert error.mean() == pytest.approx(0.25, abs=0.02)  # of rounding errors that are spread evenly


def test_fp8_rounds_to_3_bits_of_mantissa(values):
    values[:, ::2] *= 1e-5  # to some that are below the smallest normal code
    quantized = decoded(matrix("fp8", values))
    largest = values.double().abs().amax(1, keepdim=True)
    normal = values.double().abs() > largest / 448 * 2**-6  # smaller numbers have a step of 2**-9 scales
    relative = (quantized / values.double() - 1).abs()[normal]
    assert relative.max() <= 2**-4 + 1e-6  # half a step, of numbers just above a power of 2
    absolute = (quantized - values.double()).abs() / (largest / 448)
    assert absolute[~normal].max() <= 2**-10 + 1e-6


@pytest.mark.parametrize("kind", CODECS)
def test_the_largest_numbers_and_rows_of_zeros_are_exact(kind):
    values = torch.tensor([[3.0, -1.0], [0.0, 0.0], [0.5, -7.0]])
    quantized = decoded(matrix(kind, values))
    assert quantized[0, 0] == pytest.approx(3.0, rel=1e-6) and quantized[2, 1] == pytest.approx(-7.0, rel=1e-6)
    assert quantized[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", CODECS)
def test_blocks_make_no_difference(kind, values, monkeypatch):
    whole = matrix(kind, values)
    monkeypatch.setattr("es_trainer.weights.codecs.BLOCK", 5 * values.shape[1])
    parts = matrix(kind, values)
    assert BLOCK > values.numel()  # so that the first was one block
    assert torch.equal(whole.codes.view(torch.uint8), parts.codes.view(torch.uint8))
    assert torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_and_embeddings_compute_with_the_decoded_numbers(kind, dtype, values):
    quantized, tolerance = matrix(kind, values, dtype), torch.finfo(dtype).eps
    x, bias = torch.randn(3, 5, 64).to(dtype), torch.randn(37).to(dtype)
    expected = x.double() @ decoded(quantized).T
    size = (x.double().abs() @ decoded(quantized).abs().T) * 2 * tolerance
    out = F.linear(x, quantized)
    assert out.dtype == dtype and ((out.double() - expected).abs() <= size).all()
    assert torch.equal(F.linear(x, quantized, bias), out + bias)
    ids = torch.tensor([[0, 36, 5], [7, 7, 1]])
    embedded = F.embedding(ids, quantized)
    assert embedded.dtype == dtype
    torch.testing.assert_close(embedded.double(), decoded(quantized)[ids], rtol=2 * tolerance, atol=0)


def test_a_number_takes_a_byte(values):
    quantized = matrix("int8", values, torch.bfloat16)
    assert quantized.stored_bytes == values.numel() + 4 * len(values)
    assert (quantized.shape, quantized.dtype, quantized.device) == (values.shape, torch.bfloat16, CPU)


def test_other_functions_are_refused(values):
    quantized = matrix("int8", values)
    for compute in (lambda: torch.mm(values, quantized), lambda: torch.exp(quantized), quantized.sum, quantized.float):
        with pytest.raises(TypeError, match="weight_quantization"):
            compute()


def test_a_perturbation_is_added_until_there_are_new_values(values):
    quantized = matrix("int8", values)
    (noise,) = LowRank(2).combine_each([("weight", values.shape)], [5], [0.3], CPU)
    expected = decoded(quantized).float().view(-1)
    noise.add(expected, expected, 0)
    expected = expected.view(values.shape)
    x, ids = torch.randn(3, 64), torch.tensor([[2, 36]])
    quantized.added = noise
    torch.testing.assert_close(F.linear(x, quantized), F.linear(x, expected), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(F.embedding(ids, quantized), expected[ids])
    quantized.copy_(values)
    torch.testing.assert_close(F.linear(x, quantized), F.linear(x, decoded(quantized).float()), rtol=1e-3, atol=1e-3)


def test_new_values_are_quantized(values):
    quantized = matrix("int8", torch.zeros_like(values))
    quantized.copy_(values.view(-1))
    assert torch.equal(quantized.codes, matrix("int8", values).codes)


def test_numbers_that_are_not_finite_are_found(values):
    assert torch.linalg.vector_norm(matrix("int8", values), math.inf) == pytest.approx(float(values.abs().max()))
    values[3, 2] = math.nan
    assert torch.linalg.vector_norm(matrix("int8", values), math.inf).isnan()
