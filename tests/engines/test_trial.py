"""How far answers may be from one another."""

import pytest
import torch
from conftest import make_model

from es_trainer.engines import trial


@pytest.fixture
def products():
    """Sets the precision of a backend's float32 products, for one test."""
    before = [(b, b.fp32_precision) for b in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]

    def set_precision(backend, precision: str) -> None:
        backend.matmul.fp32_precision = precision

    yield set_precision
    for backend, precision in before:
        backend.fp32_precision = precision


def test_products_of_low_precision_are_further_apart(products):
    model = make_model()
    assert trial.tolerance(model) == trial.TOLERANCE
    products(torch.backends.mkldnn, "bf16")
    assert trial.tolerance(model) == trial.COARSE_TOLERANCE


def test_the_precision_of_another_backend_does_not_matter(products):
    """`torch.get_float32_matmul_precision` raises in this state."""
    products(torch.backends.cuda, "tf32")
    products(torch.backends.mkldnn, "ieee")
    assert trial.tolerance(make_model()) == trial.TOLERANCE
