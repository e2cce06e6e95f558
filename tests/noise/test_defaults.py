"""Settings of torch and of the machine that must not change any noise."""

import contextlib
import logging

import numba.core.caching
import numpy as np
import pytest
import torch
from conftest import assert_same
from torch import nn

from es_trainer.evolution import EvolutionStrategy, Member
from es_trainer.noise import cpu, noise
from es_trainer.noise.shapes import Factors, Gaussian, LowRank
from es_trainer.weights.layouts import EngineWeights
from es_trainer.weights.part import Part


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(perturbation: Gaussian, master_weights: str, strided: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu"))

    parameters = {"matrix": parameter(40, 30), "vector": parameter(50)}
    part = Part("matrix", torch.Size((40, 30)), offset=10, length=10, period=30)
    room = torch.empty(400, dtype=torch.bfloat16, device="cpu")
    optimizer = EvolutionStrategy(
        list(parameters.items()),
        population_size=4,
        rule="adam",
        anchor_decay=0.1,
        dtype=torch.bfloat16,
        perturbation=perturbation,
        master_weights=master_weights,
        engine_weights={parameters["matrix"]: EngineWeights(part, room)} if strided else None,
    )
    found = {}
    optimizer.perturb(Member(3))
    for shard in optimizer.weights.shards:
        found[f"{shard.name} perturbed"] = shard.working.clone()
        if not strided:
            values = optimizer.weights.of_members(shard, [Member(1), Member(2, -1)], 0.1)
            tensors = [values.left, values.right] if isinstance(values, Factors) else [values]
            found |= {f"{shard.name} of members {i}": tensor for i, tensor in enumerate(tensors)}
    optimizer.tell(optimizer.ask(), [1.0, 2.0, -1.0, 0.5])
    optimizer.step()
    found |= {f"{shard.name} trained": shard.trained.clone() for shard in optimizer.weights.shards}
    found["checksums"] = torch.tensor(
        [number % 2**62 for number in optimizer.weights.checksums()], dtype=torch.int64, device="cpu"
    )
    return found


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("master_weights", ["device", "host"])
@pytest.mark.parametrize("perturbation", [Gaussian(), LowRank(2)], ids=["gaussian", "low_rank"])
def test_default_dtype_and_device_change_nothing(monkeypatch, perturbation, master_weights, strided):
    expected = run(perturbation, master_weights, strided)
    for setting in (default_dtype(torch.float64), default_dtype(torch.bfloat16), torch.device("meta")):
        monkeypatch.delattr(noise._scratch, "buffer", raising=False)
        with setting:
            found = run(perturbation, master_weights, strided)
        assert_same(found, expected)
        assert all(found[name].dtype == expected[name].dtype for name in expected)


def test_kernels_without_a_place_for_a_cache(monkeypatch, caplog):
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    logging.getLogger("es_trainer").propagate = True
    cpu.logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):

        @cpu.kernel()
        def double(values):
            for i in range(values.shape[0]):
                values[i] *= 2

    values = np.arange(3.0)
    double(values)
    assert values.tolist() == [0.0, 2.0, 4.0]
    assert "no locator available" in caplog.text and "NUMBA_CACHE_DIR" in caplog.text
