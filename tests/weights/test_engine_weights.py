"""Weights that live in an engine's memory, whole or in part."""

from itertools import combinations

import pytest
import torch
from torch import nn

from es_trainer.evolution import EvolutionStrategy, Member
from es_trainer.evolution import optimizer as optimizer_module
from es_trainer.noise import noise
from es_trainer.noise.shapes import Gaussian, LowRank, StridedSum
from es_trainer.weights.layouts import EngineWeights
from es_trainer.weights.part import Part


SHAPES = {"whole": (6, 10), "rows": (8, 5), "columns": (7, 12), "experts": (3, 8, 4), "vector": (9,)}
NOISES = pytest.mark.parametrize("perturbation", [Gaussian(), LowRank(2)], ids=["gaussian", "low_rank"])


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def engine_weights_of(rank: int, dtype: torch.dtype) -> dict[str, EngineWeights]:
    """What the engine of one of two processes has: its half, or all of what both have."""
    shapes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    parts = [
        Part.whole("whole", shapes["whole"], replica=rank > 0),
        Part.piece("rows", shapes["rows"], 20 * rank, 20),
        Part("columns", shapes["columns"], 6 * rank, 6, 12),
        # Rows 2 to 4 and 6 to 8, or the others, of each expert's gate and up projection
        Part("experts", shapes["experts"], 8 * rank, 8, 16),
        Part.whole("vector", shapes["vector"], replica=rank > 0),
    ]
    return {part.name: EngineWeights(part, torch.empty(part.numel, dtype=dtype)) for part in parts}


def make(perturbation, rank=None, dtype=torch.float32, **options):
    parameters = make_parameters()
    own = None if rank is None else engine_weights_of(rank, dtype)
    optimizer = EvolutionStrategy(
        list(parameters.items()),
        lr=0.3,
        population_size=4,
        dtype=dtype,
        perturbation=perturbation,
        engine_weights=own and {parameters[name]: weights for name, weights in own.items()},
        **options,
    )
    if own is not None:
        optimizer.weights.refresh()  # the engine has loaded them
    return parameters, optimizer


def step(optimizer, utilities=(1.0, -2.0, 0.5, 3.0)):
    population = optimizer.ask()
    optimizer.tell(population, utilities)
    optimizer.step()


@NOISES
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_parts_are_those_of_the_whole(perturbation, rank, dtype, rule):
    plain, reference = make(perturbation, dtype=dtype, rule=rule, weight_decay=0.1)
    _, optimizer = make(perturbation, rank, dtype, rule=rule, weight_decay=0.1)

    def check():
        for shard in optimizer.weights.shards:
            assert torch.equal(shard.working, shard.part.of(plain[shard.name].data)), shard.name

    check()
    for each in (reference, optimizer):
        each.perturb(Member(3, -1))
    check()
    for each in (reference, optimizer):
        each.restore()
    check()
    for _ in range(2):
        step(reference)
        step(optimizer)
        check()


@NOISES
def test_norms_add_up_to_those_of_the_whole(perturbation):
    _, reference = make(perturbation)
    parts = [make(perturbation, rank)[1] for rank in (0, 1)]
    for optimizer in (reference, *parts):
        step(optimizer)
    squares = [part.update_norm**2 for part in parts]
    assert sum(squares) == pytest.approx(reference.update_norm**2, rel=1e-6)
    squares = [part.distance_from_start() ** 2 for part in parts]
    assert sum(squares) == pytest.approx(reference.distance_from_start() ** 2, rel=1e-6)


class Counted:
    """Stands for a sum on a device where each call is a launch."""

    def __init__(self):
        self.calls = 0

    def add(self, source, target, start=0, rounding=None):
        self.calls += 1
        target.copy_(source + 1)


@pytest.mark.parametrize("period", [4096, 40_000, 65_536])
def test_columns_of_a_wide_matrix_take_few_launches(monkeypatch, period):
    piece = 1 << 17
    monkeypatch.setattr(noise, "piece_size", lambda device: piece)  # a device with larger pieces than the CPU
    terms, rows = Counted(), (1 << 20) // period
    source = torch.arange(rows * period / 4)
    target = torch.empty_like(source)
    StridedSum(terms, period // 4, period // 4, period).add(source, target)
    assert torch.equal(target, source + 1)
    assert terms.calls <= (1 << 20) // piece + 4


def test_a_parameter_that_is_there_whole_is_a_view():
    parameters, optimizer = make(Gaussian(), 0)
    working = {shard.name: shard.working for shard in optimizer.weights.shards}["whole"]
    assert parameters["whole"].data_ptr() == working.data_ptr()
    assert parameters["rows"].numel() == 0 and optimizer.weights.partitioned


def test_parts_put_together():
    whole = torch.arange(84.0).view(7, 12)
    found = torch.zeros(7, 12)
    for rank in (0, 1):
        part = engine_weights_of(rank, torch.float32)["columns"].part
        part.put_into(found, part.of(whole))
    assert torch.equal(found, whole)


@pytest.mark.parametrize("name", ["rows", "columns", "experts"])
def test_any_weights_of_a_part_can_be_taken_from_the_whole(name):
    part = engine_weights_of(1, torch.float32)[name].part
    whole = make_parameters()[name].data
    for start, stop in combinations(range(part.numel + 1), 2):
        assert torch.equal(part.piece_of(whole, start, stop), part.of(whole)[start:stop])


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_parts_are_pulled_to_initial_weights_that_are_read(rank):
    start, options = make_parameters(), {"rule": "adam", "anchor_decay": 0.5}
    _, keeping = make(Gaussian(), rank, **options)
    _, reading = make(
        Gaussian(), rank, **options, anchor_weights=lambda part, *piece: part.piece_of(start[part.name].data, *piece)
    )
    for _ in range(3):
        step(keeping)
        step(reading)
    for mine, theirs in zip(reading.weights.shards, keeping.weights.shards, strict=True):
        assert torch.equal(mine.trained, theirs.trained), mine.name


def kept(optimizer) -> dict[str, torch.Tensor]:
    """All that an optimizer keeps of a parameter, by its key."""
    tensors = {}
    for shard in optimizer.weights.shards:
        state = {"weights": shard.trained, **optimizer.state[shard.parameter]}
        tensors |= {(shard.name, key): (shard.part, values) for key, values in state.items()}
    return tensors


@pytest.mark.parametrize("before", [(None,), (0, 1)], ids=["whole", "parts"])
@pytest.mark.parametrize("after", [None, 0, 1])
def test_a_state_goes_on_in_other_parts(monkeypatch, before, after):
    monkeypatch.setattr(optimizer_module, "DISTANCE_SAMPLE", 40)  # so that not every weight is looked at
    options = {"rule": "adam", "anchor_decay": 0.1, "weight_decay": 0.1}
    saved = [make(LowRank(2), rank, **options)[1] for rank in before]
    _, loaded = make(LowRank(2), after, **options)
    _, expected = make(LowRank(2), after, **options)
    for optimizer in [*saved, expected]:
        step(optimizer)
    for optimizer in [loaded]:  # what it held before counts for nothing
        step(optimizer, utilities=(5.0, 1.0, 0.0, -2.0))
        optimizer.begin()
    loaded.load_parts([optimizer.state_dict() for optimizer in saved])
    for optimizer in (loaded, expected):
        step(optimizer)
    for key, (_, values) in kept(expected).items():
        assert torch.equal(kept(loaded)[key][1], values), key
    assert loaded.distance_from_start() == expected.distance_from_start() > 0


def test_a_part_that_no_process_has_saved_is_missed():
    _, first = make(Gaussian(), 0)
    with pytest.raises(ValueError, match="for parameter 'rows', it lacks 20 of the numbers of 'weights'"):
        make(Gaussian(), 1)[1].load_parts([first.state_dict()])


@NOISES
@pytest.mark.parametrize(
    ("shape", "runs"),
    [
        ((50, 1000), (200, 300, 1000)),
        ((5, 100_000), (25_000, 50_000, 100_000)),  # a period is longer than a piece
        ((2, 40_000), (0, 1, 40_000)),
        ((300, 7), (6, 1, 7)),
        ((1, 200_000), (100_000, 100_000, 200_000)),
    ],
)
def test_strided_noise_of_any_size(perturbation, shape, runs):
    size = shape[0] * shape[1]
    source = torch.randn(size, generator=torch.Generator().manual_seed(1))
    slice_ = Part("name", torch.Size(shape), *runs)
    whole = torch.empty(size)
    perturbation.combine("name", shape, [1, 2], [0.5, -2.0], whole.device).add(source, whole)
    parameter = nn.Parameter(source.view(shape))
    own = EngineWeights(slice_, torch.empty(slice_.numel))
    optimizer = EvolutionStrategy([("name", parameter)], perturbation=perturbation, engine_weights={parameter: own})
    (shard,) = optimizer.weights.shards
    terms = optimizer.weights.weighted_sum(shard, [1, 2], [0.5, -2.0])
    part = slice_.of(source).clone()
    expected = slice_.of(whole)
    target = torch.empty_like(part)
    terms.add(part, target)
    assert torch.equal(target, expected)
    # Any slice of it, and in place
    for low in (0, 1, len(part) // 3, len(part) - 1):
        terms.add(part[low : low + 70_000], target[low : low + 70_000], low)
        assert torch.equal(target[low : low + 70_000], expected[low : low + 70_000])
    terms.add(part, part)
    assert torch.equal(part, expected)
    assert noise.CPU_PIECE < 100_000
