import math

import numpy as np
import pytest
import torch
from torch import nn

from es_trainer.evolution import EvolutionStrategy, Member
from es_trainer.noise import noise
from es_trainer.noise.shapes import Gaussian, LowRank
from es_trainer.weights import store
from es_trainer.weights.layouts import EngineWeights
from es_trainer.weights.part import Part
from es_trainer.weights.store import Weights


CPU = torch.device("cpu")
SHAPES = {"linear.weight": (40, 70), "norm.weight": (33,), "experts.up": (3, 30, 20)}

ranks = pytest.mark.parametrize("rank", [1, 3])


def dense(rank: int, name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The perturbation of a member, made from the noise itself."""
    if len(shape) == 1:
        return noise.fill(torch.empty(shape), name, seed)
    *matrices, rows, columns = shape
    count = math.prod(matrices)
    normals = noise.fill(torch.empty(count * rank * (rows + columns)), name, seed)
    left, right = normals[: count * rows * rank], normals[count * rows * rank :]
    left, right = left.view(count, rows, rank), right.view(count, columns, rank)
    return (left @ right.mT).view(shape) / math.sqrt(rank)


def combined(noises: Gaussian, name: str, shape: tuple[int, ...], seeds: list[int], coefficients=None) -> torch.Tensor:
    coefficients = [1.0] * len(seeds) if coefficients is None else coefficients
    target = torch.full((math.prod(shape),), torch.nan)
    noises.combine(name, shape, seeds, coefficients, CPU).add(None, target)
    return target.view(shape)


def make_parameters(dtype=torch.float32, shapes=SHAPES) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def make(rank=2, parameters=None, **options):
    parameters = parameters or make_parameters()
    options = {"population_size": 6, "perturbation": LowRank(rank), **options}
    return parameters, EvolutionStrategy(list(parameters.items()), **options)


def snapshot(parameters) -> dict[str, torch.Tensor]:
    return {name: parameter.data.clone() for name, parameter in parameters.items()}


def assert_same(mine, theirs):
    for name in theirs:
        assert torch.equal(mine[name], theirs[name]), name


def assert_near(mine, theirs, atol=1e-5):
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=atol)


# ---- one member ----


@ranks
def test_a_matrix_gets_the_product_of_two_factors_of_the_noise(rank):
    rows, columns = 9, 14
    normals = noise.fill(torch.empty((rows + columns) * rank), "linear.weight", seed=5)
    a, b = normals[: rows * rank].view(rows, rank), normals[rows * rank :].view(columns, rank)
    assert_near(combined(LowRank(rank), "linear.weight", (rows, columns), [5]), a @ b.T / rank**0.5)


@ranks
def test_a_stack_gets_factors_of_its_own_for_each_matrix(rank):
    stack = combined(LowRank(rank), "experts.up", (4, 9, 14), [5])
    normals = noise.fill(torch.empty(4 * (9 + 14) * rank), "experts.up", seed=5)
    a, b = normals[: 4 * 9 * rank].view(4, 9, rank), normals[4 * 9 * rank :].view(4, 14, rank)
    for matrix, left, right in zip(stack, a, b, strict=True):
        assert_near(matrix, left @ right.T / rank**0.5)
    flat = stack.view(4, -1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    assert (flat @ flat.T - torch.eye(4)).abs().max() < 0.7
    assert_near(combined(LowRank(rank), "experts.up", (2, 2, 9, 14), [5]).view(4, 9, 14), stack)


def test_a_vector_gets_full_noise():
    vector = combined(LowRank(3), "norm.weight", (33,), [5])
    assert torch.equal(vector, noise.fill(torch.empty(33), "norm.weight", 5))
    assert torch.equal(vector, combined(Gaussian(), "norm.weight", (33,), [5]))


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_rank_is_what_it_is_called(rank):
    assert torch.linalg.matrix_rank(combined(LowRank(rank), "linear.weight", (20, 30), [1])) == rank
    assert torch.linalg.matrix_rank(combined(LowRank(rank), "up", (3, 20, 30), [1])).tolist() == [rank] * 3


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2)])
def test_entries_are_uncorrelated_and_of_variance_one(rank, shape):
    count = 4000
    samples = torch.stack([combined(LowRank(rank), "weight", shape, [seed]).flatten() for seed in range(count)])
    covariance = samples.T @ samples / count
    # The fourth moment of an entry is 3 + 6 / rank, that of two in one row is 3 at the most
    error = 5 * ((2 + 6 / rank) / count) ** 0.5
    assert samples.mean(0).abs().max() < 5 / count**0.5
    assert (covariance - torch.eye(len(covariance))).abs().max() < error


def test_no_two_parameters_share_factors():
    first, second = (combined(LowRank(1), name, (64, 64), [1]).flatten() for name in ("layers.0.w", "layers.1.w"))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.2


# ---- slices ----


SLICES = [(0, 1), (0, 70), (3, 5), (65, 10), (68, 150), (599, 2), (590, 700), (1, 1799), (1799, 1), (0, 1800)]


@pytest.mark.parametrize("block", [64, 1 << 15])
@pytest.mark.parametrize("shape", [(60, 30), (3, 30, 20), (1, 1800), (1800, 1)])
def test_any_slice_is_that_slice_of_the_whole(monkeypatch, shape, block):
    whole = combined(LowRank(2), "weight", shape, [3, 4, 5], [0.5, -2.0, 1.0]).flatten()
    monkeypatch.setattr(noise, "CPU_PIECE", block)
    terms = LowRank(2).combine("weight", shape, [3, 4, 5], [0.5, -2.0, 1.0], CPU)
    source = torch.linspace(-3, 3, 1800)
    for start, length in SLICES:
        stop = start + length
        target = torch.full((length,), torch.nan)
        terms.add(None, target, start)
        assert torch.equal(target, whole[start:stop])
        terms.add(source[start:stop], target, start)
        assert_near(target, source[start:stop] + whole[start:stop])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(60, 30), (3, 30, 20)])
def test_the_sum_is_rounded_once(dtype, shape):
    terms = LowRank(2).combine("weight", shape, [3, 4], [0.5, -2.0], CPU)
    source = torch.linspace(-3, 3, 1800)
    exact, rounded, from_rounded = torch.empty(1800), torch.empty(1800, dtype=dtype), torch.empty(1800, dtype=dtype)
    terms.add(source, exact)
    terms.add(source, rounded)
    assert torch.equal(rounded, exact.to(dtype))
    terms.add(source.to(dtype).float(), exact)
    terms.add(source.to(dtype), from_rounded)
    assert torch.equal(from_rounded, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_target_may_be_the_source(monkeypatch, dtype):
    monkeypatch.setattr(noise, "CPU_PIECE", 128)
    terms = LowRank(2).combine("weight", (60, 30), [3, 4], [0.5, -2.0], CPU)
    source = torch.linspace(-3, 3, 1800).to(dtype)
    target = torch.empty(1800, dtype=dtype)
    terms.add(source, target)
    terms.add(source, source)
    assert torch.equal(source, target)


# ---- factors ----


def factors_of(noises: Gaussian, name: str, shape: tuple[int, ...], seeds: list[int], coefficients: list[float]):
    (factors,) = noises.factors_each([(name, shape)], seeds, coefficients, CPU)
    return factors


@ranks
@pytest.mark.parametrize("shape", [(40, 70), (3, 30, 20)])
def test_factors_are_the_members_perturbations(rank, shape):
    seeds, coefficients = [7, 7, 9], [0.1, -0.1, 0.02]
    factors = factors_of(LowRank(rank), "weight", shape, seeds, coefficients)
    for m, (seed, coefficient) in enumerate(zip(seeds, coefficients, strict=True)):
        product = (factors.left[m].mT @ factors.right[m]).view(shape)
        assert_near(product, combined(LowRank(rank), "weight", shape, [seed], [coefficient]))
        assert_near(product, coefficient * dense(rank, "weight", shape, seed))


def test_factors_have_the_dtype_of_the_weights():
    exact = factors_of(LowRank(2), "weight", (40, 70), [1], [0.1])
    _, optimizer = make(parameters=make_parameters(torch.bfloat16, {"weight": (40, 70)}))
    rounded = optimizer.weights.of_members(optimizer.weights.shards[0], [Member(1)], 0.1)
    assert torch.equal(rounded.left, exact.left.bfloat16()) and torch.equal(rounded.right, exact.right.bfloat16())


@pytest.mark.parametrize("sigma", [1e-3, 1e-6, 1e-8])
def test_a_tiny_sigma_leaves_factors_of_float16_their_precision(sigma):
    for sign in (1, -1):
        factors = factors_of(LowRank(2), "weight", (400, 700), [1], [sign * sigma]).to(torch.float16)
        product = factors.left[0].double().mT @ factors.right[0].double()
        expected = sign * sigma * dense(2, "weight", (400, 700), 1).double()
        # Each entry is rounded by 2**-12 of itself on average, and two of them make a term
        assert (product - expected).norm() < 1e-3 * expected.norm()


def test_full_noise_has_no_factors():
    assert factors_of(Gaussian(), "weight", (40, 70), [1], [0.1]) is None
    assert factors_of(LowRank(2), "norm.weight", (33,), [1], [0.1]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noises", [Gaussian(), LowRank(1), LowRank(3)], ids=["gaussian", "rank 1", "rank 3"])
def test_memory_of_a_member_is_what_its_values_take(noises, dtype):
    weights = Weights(make_parameters(dtype).items(), perturbation=noises)
    sizes = []
    for shard in weights.shards:
        values = weights.of_members(shard, [Member(1), Member(2)], 0.1)
        tensors = [values] if isinstance(values, torch.Tensor) else [values.left, values.right]
        expected = torch.float32 if len(shard.shape) < 2 else dtype
        assert all(tensor.dtype == expected and len(tensor) == 2 for tensor in tensors)
        assert sum(tensor[0].numel() for tensor in tensors) == noises.numbers(shard.shape)
        sizes += [tensor[0].nbytes for tensor in tensors]
    assert weights.member_bytes() == sum(sizes)


@pytest.mark.parametrize("master_weights", ["device", "none"])
@pytest.mark.parametrize("noises", [Gaussian(), LowRank(1), LowRank(3)], ids=["gaussian", "rank 1", "rank 3"])
def test_values_of_members_are_what_is_written_for_each(noises, master_weights):
    parameters = make_parameters()
    weights = Weights(parameters.items(), perturbation=noises, master_weights=master_weights)
    before = snapshot(parameters)
    members = [Member(5), Member(5, -1), Member(6)]
    values = {shard.name: weights.of_members(shard, members, 0.1) for shard in weights.shards}
    assert_same(snapshot(parameters), before)
    for m, member in enumerate(members):
        weights.perturb(member, 0.1)
        for name, parameter in parameters.items():
            if isinstance(values[name], torch.Tensor):
                assert_near(values[name][m], parameter.data, atol=1e-6)
            else:
                product = values[name].left[m].mT @ values[name].right[m]
                assert_near(before[name] + product.view(before[name].shape), parameter.data, atol=1e-6)


# ---- a population ----


@pytest.mark.parametrize("shape", [(40, 70), (3, 30, 20), (33,)])
def test_the_sum_is_that_of_the_members(shape):
    seeds, coefficients = list(range(10)), np.random.default_rng(0).normal(size=10).tolist()
    total = combined(LowRank(2), "weight", shape, seeds, coefficients)
    singles = (combined(LowRank(2), "weight", shape, [s], [c]) for s, c in zip(seeds, coefficients, strict=True))
    assert_near(total, sum(singles))


@pytest.mark.parametrize(("members", "expected"), [(1, 2), (5, 10), (6, 12), (12, 12)])
def test_the_rank_of_the_sum_grows_with_the_population(members, expected):
    total = combined(LowRank(2), "weight", (12, 20), list(range(members)))
    assert torch.linalg.matrix_rank(total) == expected


@pytest.mark.parametrize("noises", [Gaussian(), LowRank(1), LowRank(4)], ids=["gaussian", "rank 1", "rank 4"])
def test_the_expected_update_is_the_gradient(noises):
    sigma, pairs = 0.5, 2000
    parameters = make_parameters(shapes={"matrix": (6, 5), "vector": (7,), "stack": (3, 4, 3)})
    start = snapshot(parameters)
    generator = torch.Generator().manual_seed(1)
    targets = {name: values + torch.randn(values.shape, generator=generator) for name, values in start.items()}
    optimizer = EvolutionStrategy(
        list(parameters.items()),
        lr=1 / sigma,
        sigma=sigma,
        population_size=2 * pairs,
        antithetic=True,
        fitness_shaping="none",
        perturbation=noises,
    )
    population = optimizer.ask()
    rewards = []
    for member in population:
        optimizer.perturb(member)
        rewards.append(-sum(float((parameters[n].data - targets[n]).square().sum()) for n in targets) / 2)
    optimizer.tell(population, rewards)
    optimizer.step()

    updates = {name: parameters[name].data - start[name] for name in targets}
    gradients = {name: targets[name] - start[name] for name in targets}
    total = sum(float(gradient.square().sum()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        # The estimate is the mean of <gradient, E> E over the pairs; for rank 1, E<G, E>^4 is up to 9 |G|^4
        slope = float((updates[name] * gradient).sum() / gradient.square().sum())
        deviation = (8 * total / float(gradient.square().sum()) / pairs) ** 0.5
        assert abs(slope - 1) < 4 * deviation, name
    update, gradient = (torch.cat([v.flatten() for v in each.values()]) for each in (updates, gradients))
    # and E (<G, E> |E|)^2 of a matrix is up to |G|^2 (rows + 2) (columns + 2)
    error = float((update - gradient).square().sum() / gradient.square().sum())
    assert error < 1.5 * (8 * 7 + 9 + 3 * 6 * 5) / pairs
    assert torch.cosine_similarity(update, gradient, dim=0) > 0.95


# ---- in the optimizer ----


@ranks
@pytest.mark.parametrize("master_weights", ["device", "host", "none"])
def test_step_is_the_weighted_sum_of_the_perturbations(monkeypatch, rank, master_weights):
    monkeypatch.setattr(noise, "CPU_PIECE", 256)
    parameters, optimizer = make(rank, lr=0.5, fitness_shaping="z_score", master_weights=master_weights)
    before = snapshot(parameters)
    population = optimizer.ask()
    utilities = optimizer.tell(population, [1.0, 5.0, 2.0, 2.5, -4.0, 0.0])
    optimizer.step()
    squares = 0.0
    for name, parameter in parameters.items():
        terms = (u * dense(rank, name, SHAPES[name], m.seed) for u, m in zip(utilities, population, strict=True))
        update = 0.5 / 6 * sum(terms)
        torch.testing.assert_close(parameter.data, before[name] + update, rtol=0, atol=5e-6)
        squares += float(update.square().sum())
    assert optimizer.update_norm == pytest.approx(squares**0.5, rel=1e-5)
    assert optimizer.distance_from_start() == pytest.approx(squares**0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("shapes", "population"),
    [(SHAPES, 6), ({"embedding.weight": (1500, 1500), "norm.weight": (70_000,)}, 40)],
    ids=["small", "large"],
)
def test_results_do_not_depend_on_the_number_of_threads(monkeypatch, shapes, population):
    monkeypatch.setattr(noise, "CPU_PIECE", 4096)  # so that small tensors are shared, too
    results, norms = [], []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            parameters, optimizer = make(
                parameters=make_parameters(shapes=shapes), lr=0.1, rule="adam", population_size=population
            )
            for step in range(2):
                members = optimizer.ask()
                optimizer.perturb(members.members[0])
                results.append(snapshot(parameters))
                optimizer.tell(members, np.random.default_rng(step).normal(size=population))
                optimizer.step()
            results.append(snapshot(parameters))
            norms.append(optimizer.update_norm)
    finally:
        torch.set_num_threads(threads)
    for first, second, third in zip(results[:3], results[3:6], results[6:], strict=True):
        assert_same(second, first)
        assert_same(third, first)
    assert norms[0] == norms[1] == norms[2]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(50, 70), (3, 30, 20)])
def test_factors_of_many_members_are_drawn_by_and_by(monkeypatch, shape, strided):
    members, rank, most = 200, 2, 3000
    drawn = []

    def fill_each(targets, names, seeds):
        drawn.append(sum(target.numel() for target in targets))
        exact(targets, names, seeds)

    exact = noise.fill_each
    monkeypatch.setattr(noise, "fill_each", fill_each)
    monkeypatch.setattr(noise, "CUDA_PIECE", 1024)
    results = []
    for limit in (1 << 26, most, 1):
        monkeypatch.setattr(store, "MOST_FACTORS", limit)
        parameters = make_parameters(shapes={"weight": shape, "norm.weight": (33,)})
        period = shape[-1]
        room = torch.empty(math.prod(shape) // period * 10)
        own = EngineWeights(Part("weight", torch.Size(shape), 5, 10, period), room)
        own = {parameters["weight"]: own} if strided else None
        _, optimizer = make(rank, parameters, population_size=members, lr=1.0, rule="adam", engine_weights=own)
        drawn.clear()
        optimizer.tell(optimizer.ask(), np.random.default_rng(0).normal(size=members))
        optimizer.step()
        if limit == most:
            assert max(drawn) <= most < members * LowRank(rank).numbers(shape)
        results.append([shard.trained for shard in optimizer.weights.shards])
        results[-1].append(torch.tensor(optimizer.update_norm))
    for result in results[1:]:
        for mine, theirs in zip(result[:-1], results[0][:-1], strict=True):
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(result[-1], results[0][-1])
