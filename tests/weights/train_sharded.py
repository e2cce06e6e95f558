"""One of some processes among which FSDP2 shards a model: `train_sharded.py RANK PROCESSES PORT FOLDER`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from es_trainer.evolution import EvolutionStrategy
from es_trainer.run.checkpoint import save_state


RANK, PROCESSES, PORT, FOLDER = *map(int, sys.argv[1:4]), Path(sys.argv[4])
OPTIONS = {"lr": 0.3, "rule": "adam", "population_size": 4, "weight_decay": 0.1}
PROMPTS = torch.arange(12).view(2, 6)


def shard(model, mesh) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    found = model(PROMPTS).logits
    if hasattr(model, "reshard"):
        model.reshard()
    return found


def assert_same(sharded: EvolutionStrategy, whole: EvolutionStrategy) -> None:
    collected = sharded.weights.collect(keep=True)
    for mine, theirs in zip(sharded.weights.shards, whole.weights.shards, strict=True):
        assert torch.equal(mine.trained, mine.part.of(theirs.trained)), mine.name
        assert torch.equal(collected[mine.parameter], theirs.parameter.data), mine.name


store = dist.TCPStore("127.0.0.1", PORT, PROCESSES, is_master=RANK == 0)
dist.init_process_group("gloo", store=store, rank=RANK, world_size=PROCESSES)
model, reference = make_model(), make_model()
shard(model, init_device_mesh("cpu", (PROCESSES,)))
sharded, whole = (EvolutionStrategy(list(each.named_parameters()), **OPTIONS) for each in (model, reference))
assert sharded.weights.partitioned
for _ in range(2):
    population = whole.ask()
    before = logits(model)
    for member in population:
        sharded.weights.check(model)
        for optimizer in (sharded, whole):
            optimizer.perturb(member)
        perturbed = logits(model)
        assert torch.equal(perturbed, logits(reference)) and not torch.equal(perturbed, before)
    for optimizer in (sharded, whole):
        optimizer.restore()
    assert torch.equal(logits(model), before)
    for optimizer in (sharded, whole):
        optimizer.tell(population, [1.0, -2.0, 0.5, 3.0])
        optimizer.step()
    assert_same(sharded, whole)
    assert torch.equal(logits(model), logits(reference))
model(PROMPTS)
try:  # modules are gathered
    sharded.weights.check(model)
except RuntimeError as error:
    assert "than when the trainer was made" in str(error)
else:
    raise AssertionError("gathered modules were taken for sharded ones")
model.reshard()
try:
    EvolutionStrategy(list(model.named_parameters()), dtype=torch.bfloat16)
except ValueError as error:
    assert "Call `model.to(torch.bfloat16)` before `fully_shard`" in str(error)
else:
    raise AssertionError("another dtype was taken")
save_state(FOLDER, sharded, together=True, first=RANK == 0)
dist.barrier()
