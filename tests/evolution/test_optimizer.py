import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from es_trainer.evolution import EvolutionStrategy, Member
from es_trainer.evolution import optimizer as optimizer_module
from es_trainer.evolution.optimizer import UpdateRecord
from es_trainer.noise import noise
from es_trainer.noise.shapes import Gaussian, LowRank
from es_trainer.weights.rounding import write_from_host


SHAPES = {"linear.weight": (40, 70), "norm.weight": (33,), "embedding.weight": (300, 130)}


def make_parameters(dtype=torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def make(parameters=None, **options):
    parameters = parameters or make_parameters()
    return parameters, EvolutionStrategy(list(parameters.items()), **{"population_size": 5, **options})


GAUSSIAN = Gaussian()
both = pytest.mark.parametrize("perturbation", [GAUSSIAN, LowRank(2)], ids=["gaussian", "low_rank"])


def snapshot(parameters) -> dict[str, torch.Tensor]:
    return {name: parameter.data.clone() for name, parameter in parameters.items()}


def assert_same(mine, theirs):
    for name in theirs:
        assert torch.equal(mine[name], theirs[name]), name


def noise_of(seed: int, name: str, perturbation: Gaussian = GAUSSIAN) -> torch.Tensor:
    values = torch.empty(SHAPES[name])
    perturbation.combine(name, SHAPES[name], [seed], [1.0], values.device).add(None, values.view(-1))
    return values


def run_steps(optimizer, steps: int, evaluate: bool = True) -> None:
    for step in range(steps):
        population = optimizer.ask()
        for member in population:
            if evaluate:
                optimizer.perturb(member)
        optimizer.tell(population, np.random.default_rng(step).normal(size=len(population)))
        optimizer.step()


def test_perturb_adds_sigma_times_noise():
    parameters, optimizer = make(sigma=0.1)
    before = snapshot(parameters)
    optimizer.perturb(Member(seed=7, sign=-1))
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.data, before[name] - 0.1 * noise_of(7, name), rtol=0, atol=1e-6)


def test_no_two_parameters_share_noise():
    parameters = {name: nn.Parameter(torch.zeros(64, 64)) for name in ("layers.0.weight", "layers.1.weight")}
    _, optimizer = make(parameters, sigma=1.0)
    optimizer.perturb(Member(seed=1))
    first, second = (parameter.data.flatten() for parameter in parameters.values())
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.06


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master_weights", ["device", "host"])
def test_weights_are_bit_identical_after_an_evaluation(dtype, master_weights, perturbation):
    parameters, optimizer = make(
        make_parameters(dtype), sigma=0.3, master_weights=master_weights, perturbation=perturbation
    )
    before = snapshot(parameters)
    for member in optimizer.ask():
        optimizer.perturb(member)
        assert not torch.equal(parameters["norm.weight"].data, before["norm.weight"])
    optimizer.restore()
    assert_same(snapshot(parameters), before)


@both
def test_a_member_leaves_nothing_behind_for_the_next(perturbation):
    parameters, optimizer = make(sigma=0.3, perturbation=perturbation)
    optimizer.perturb(Member(1))
    optimizer.perturb(Member(2))
    after_another = snapshot(parameters)
    optimizer.restore()
    optimizer.perturb(Member(2))
    assert_same(snapshot(parameters), after_another)


@both
def test_weights_written_from_host_memory_are_the_same(monkeypatch, perturbation):
    monkeypatch.setattr(noise, "CPU_PIECE", 4096)
    parameters, optimizer = make(sigma=0.3, perturbation=perturbation)
    optimizer.perturb(Member(seed=5, sign=-1))
    directly = snapshot(parameters)
    optimizer.restore()
    for shard in optimizer.weights.shards:
        terms = perturbation.combine(shard.name, shard.shape, [5], [-0.3], shard.working.device)
        write_from_host(shard.master, shard.working, terms, None)
    assert_same(snapshot(parameters), directly)


@both
def test_without_master_weights_come_back_up_to_rounding(perturbation):
    parameters, optimizer = make(sigma=0.1, master_weights="none", perturbation=perturbation)
    before = snapshot(parameters)
    for member in optimizer.ask():
        optimizer.perturb(member)
    optimizer.restore()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.data, before[name], rtol=0, atol=1e-5)
        assert parameter.data.data_ptr() == optimizer.weights.shards[list(parameters).index(name)].working.data_ptr()
    optimizer.restore()  # nothing is taken out twice
    torch.testing.assert_close(parameters["norm.weight"].data, before["norm.weight"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("master_weights", ["device", "host", "none"])
def test_step_is_the_papers_update(master_weights):
    parameters, optimizer = make(lr=0.5, fitness_shaping="z_score", master_weights=master_weights)
    before = snapshot(parameters)
    population = optimizer.ask()
    utilities = optimizer.tell(population, [1.0, 5.0, 2.0, 2.5, -4.0])
    optimizer.step()
    squares = 0.0
    for name, parameter in parameters.items():
        update = 0.5 / 5 * sum(u * noise_of(m.seed, name) for u, m in zip(utilities, population, strict=True))
        torch.testing.assert_close(parameter.data, before[name] + update, rtol=0, atol=2e-6)
        squares += float(update.square().sum())
    assert optimizer.update_norm == pytest.approx(squares**0.5, rel=1e-5)
    assert optimizer.distance_from_start() == pytest.approx(squares**0.5, rel=1e-4)


def test_a_member_without_fitness_weighs_like_an_average_one():
    """The sum over the others is divided by the size of the population, so the step is shorter."""
    parameters, optimizer = make(lr=0.5, population_size=4)
    before = snapshot(parameters)
    population = optimizer.ask()
    utilities = optimizer.tell(population, [[1.0, 3.0], [5.0, np.nan], [np.nan, np.nan], [4.0, 2.0]])
    optimizer.step()
    # Of the prompts' means 10/3 and 5/2, the member with the first alone has that which is 5/12 easier than both
    fitness = np.array([2.0, 5.0 - 5 / 12, 3.0])
    expected = (fitness - fitness.mean()) / fitness.std()
    np.testing.assert_allclose(utilities, [expected[0], expected[1], 0.0, expected[2]])
    members = [population.members[i] for i in (0, 1, 3)]
    for name, parameter in parameters.items():
        update = 0.5 / 4 * sum(u * noise_of(m.seed, name) for u, m in zip(expected, members, strict=True))
        torch.testing.assert_close(parameter.data, before[name] + update, rtol=0, atol=2e-6)


@both
def test_antithetic_step_weighs_a_noise_by_the_difference_of_its_pair(perturbation):
    parameters, optimizer = make(
        lr=1.0, fitness_shaping="none", antithetic=True, population_size=4, perturbation=perturbation
    )
    before = snapshot(parameters)
    population = optimizer.ask()
    optimizer.tell(population, [3.0, 1.0, 10.0, 30.0])
    optimizer.step()
    first, second = population.members[0].seed, population.members[2].seed
    for name, parameter in parameters.items():
        update = (2.0 * noise_of(first, name, perturbation) - 20.0 * noise_of(second, name, perturbation)) / 4
        torch.testing.assert_close(parameter.data, before[name] + update, rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.99), eps=1e-6)),
    ],
)
def test_rules_are_those_of_torch(rule, reference, perturbation):
    parameters, optimizer = make(lr=0.1, rule=rule, betas=(0.8, 0.99), eps=1e-6, perturbation=perturbation)
    theirs = {name: nn.Parameter(parameter.data.clone()) for name, parameter in parameters.items()}
    torch_optimizer = reference(list(theirs.values()))
    for step in range(4):
        population = optimizer.ask()
        utilities = optimizer.tell(population, np.random.default_rng(step).normal(size=5))
        for name, parameter in theirs.items():
            g = sum(u * noise_of(m.seed, name, perturbation) for u, m in zip(utilities, population, strict=True)) / 5
            parameter.grad = -g
        torch_optimizer.step()
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.data, theirs[name].data, rtol=1e-4, atol=2e-4)


def test_decays_are_decoupled_and_pull_to_zero_and_to_the_start():
    parameters = make_parameters()
    start = snapshot(parameters)
    groups = [
        {"params": [("linear.weight", parameters["linear.weight"])], "weight_decay": 0.2},
        {"params": [(n, p) for n, p in parameters.items() if n != "linear.weight"], "weight_decay": 0.0},
    ]
    optimizer = EvolutionStrategy(groups, lr=0.5, population_size=2, anchor_decay=0.3)
    for _ in range(2):
        before = snapshot(parameters)
        population = optimizer.ask()
        utilities = optimizer.tell(population, [0.0, 1.0])
        optimizer.step()
        for name, parameter in parameters.items():
            g = sum(u * noise_of(m.seed, name) for u, m in zip(utilities, population, strict=True)) / 2
            decay = 0.2 if name == "linear.weight" else 0.0
            direction = g - decay * before[name] - 0.3 * (before[name] - start[name])
            torch.testing.assert_close(parameter.data, before[name] + 0.5 * direction, rtol=0, atol=5e-6)


def test_an_l1_anchor_pulls_by_a_constant_step_and_stops_at_the_start():
    parameters, optimizer = make(lr=0.5, anchor_decay=0.3, anchor_penalty="l1")
    start = snapshot(parameters)
    optimizer.update_record = UpdateRecord(seeds=[1], signs=[1], utilities=[1.0])
    optimizer.step()  # from the anchor, nothing pulls
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.data - start[name], 0.5 * noise_of(1, name), rtol=0, atol=5e-6)
    before = snapshot(parameters)
    optimizer.update_record = UpdateRecord(seeds=[2], signs=[1], utilities=[1e-30])  # next to no update
    optimizer.step()
    for name, parameter in parameters.items():
        way = before[name] - start[name]
        expected = before[name] - way.sign() * way.abs().clamp(max=0.5 * 0.3)
        torch.testing.assert_close(parameter.data, expected, rtol=0, atol=5e-6)
    optimizer.param_groups[0]["lr"] = 0.0
    before = snapshot(parameters)
    optimizer.update_record = UpdateRecord(seeds=[3], signs=[1], utilities=[1.0])
    optimizer.step()
    assert all(torch.equal(parameter.data, before[name]) for name, parameter in parameters.items())


class Files:
    """Stands for files from which initial weights are read."""

    def __init__(self, dtype=torch.float32):
        self.weights = {name: parameter.data for name, parameter in make_parameters(dtype).items()}

    def __call__(self, part, start, stop):
        return part.piece_of(self.weights[part.name], start, stop)


@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.parametrize(("stored", "given"), [(torch.float32,) * 2, (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize(("dtype", "master_weights"), [(None, "device"), (torch.bfloat16, "none")])
def test_where_the_anchor_is_changes_no_bit(penalty, stored, given, dtype, master_weights):
    options = {"anchor_decay": 0.5, "anchor_penalty": penalty, "dtype": dtype, "master_weights": master_weights}
    results = {}
    for place in ("device", "host", Files(stored)):
        results[place], optimizer = make(make_parameters(given), lr=0.1, anchor_weights=place, **options)
        run_steps(optimizer, 3)
        kept = [state["anchor"] for state in optimizer.state.values() if "anchor" in state]
        assert len(kept) == (0 if callable(place) else len(SHAPES))
        assert {anchor.dtype for anchor in kept} <= {given}
    device, *others = map(snapshot, results.values())
    for other in others:
        assert_same(other, device)


@pytest.mark.parametrize("before", ["device", "host", Files()], ids=["device", "host", "read"])
@pytest.mark.parametrize("after", ["device", "host", Files()], ids=["device", "host", "read"])
def test_a_run_goes_on_with_the_anchor_elsewhere(tmp_path, before, after):
    options = {"rule": "adam", "anchor_decay": 0.5, "lr": 0.1}
    whole, uninterrupted = make(**options)
    run_steps(uninterrupted, 4)
    _, first = make(**options, anchor_weights=before)
    run_steps(first, 2)
    resumed, second = make(**options, anchor_weights=after)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in (2, 3):
        population = second.ask()
        second.tell(population, np.random.default_rng(step).normal(size=5))
        second.step()
    assert_same(snapshot(resumed), snapshot(whole))


@pytest.mark.parametrize(("before", "after"), [(Files(), "device"), ("device", Files()), (Files(), Files())])
def test_a_run_does_not_go_on_with_another_anchor(before, after):
    def make_other(anchor_weights):
        parameters = make_parameters()
        parameters["norm.weight"].data[7] += 1.0
        if callable(anchor_weights):
            anchor_weights = Files()
            anchor_weights.weights["norm.weight"] = parameters["norm.weight"].data.clone()
        return make(parameters, anchor_decay=0.5, anchor_weights=anchor_weights)[1]

    _, first = make(anchor_decay=0.5, anchor_weights=before)
    with pytest.raises(ValueError, match="those of `norm.weight` are others than the run began with. Give the model"):
        make_other(after).load_state_dict(first.state_dict())


def test_initial_weights_that_are_others_than_the_parameters_are_refused():
    files = Files()
    files.weights["norm.weight"][7] += 1e-6
    with pytest.raises(ValueError, match="anchor_weights='model'.*other weights of `norm.weight`.*'host'"):
        make(anchor_decay=0.5, anchor_weights=files)
    make(anchor_decay=0.0, anchor_weights=files)  # which reads none


def test_updates_too_small_for_bfloat16_add_up_in_the_master():
    parameters = {"norm.weight": nn.Parameter(torch.ones(33, dtype=torch.bfloat16))}
    with_master, optimizer = make(copy.deepcopy(parameters), lr=3e-4)
    without, drifting = make(copy.deepcopy(parameters), lr=3e-4, master_weights="none")
    for _ in range(100):
        for strategy in (optimizer, drifting):
            strategy.update_record = UpdateRecord(seeds=[1], signs=[1], utilities=[1.0])  # always the same direction
            strategy.step()
    assert not torch.equal(with_master["norm.weight"].data, parameters["norm.weight"].data)
    assert torch.equal(without["norm.weight"].data, parameters["norm.weight"].data)


def test_no_number_of_a_step_is_waited_for_alone():
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    _, optimizer = make()
    population = optimizer.ask()
    with Waits() as waits:
        for member in population:
            optimizer.perturb(member)
        optimizer.tell(population, list(range(len(population))))
        optimizer.step()
        optimizer.distance_from_start(), optimizer.weight_norm(), optimizer.weights.not_finite()
        assert waits.count == 0
        float(torch.ones(()))  # of which a GPU would be waited for
        assert waits.count == 1


def test_equal_fitness_moves_nothing_but_counts_as_a_step():
    parameters, optimizer = make(weight_decay=0.5, rule="momentum")
    run_steps(optimizer, 2)
    before = snapshot(parameters)
    first = optimizer.ask()
    optimizer.tell(first, [2.0] * 5)
    optimizer.step()
    assert_same(snapshot(parameters), before)
    assert optimizer.update_norm == 0.0
    assert optimizer.ask() != first


@pytest.mark.parametrize("equal_steps", [0, 5, 20, 1000])
def test_adams_first_step_is_the_learning_rate_however_late_it_comes(equal_steps):
    parameters, optimizer = make(rule="adam", lr=0.1, eps=0.0)
    for _ in range(equal_steps):
        optimizer.tell(optimizer.ask(), [2.0] * 5)
        optimizer.step()
    before = snapshot(parameters)
    run_steps(optimizer, 1, evaluate=False)
    assert optimizer.updates == equal_steps + 1 and optimizer.moves == 1
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            (parameter.data - before[name]).abs(), torch.full(SHAPES[name], 0.1), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_steps_of_equal_fitness_change_no_later_step(rule):
    """Whether they come before, between or after a break: the same noises are told of, with and without them."""
    runs = []
    for with_equal_steps in (False, True):
        parameters, optimizer = make(rule=rule, lr=0.1)
        for step in range(4):
            if with_equal_steps:
                optimizer.tell(optimizer.ask(), [step] * 5)
                optimizer.step()
                state = copy.deepcopy(optimizer.state_dict())
                parameters, optimizer = make(rule=rule, lr=0.1)
                optimizer.load_state_dict(state)
            optimizer.update_record = UpdateRecord(seeds=[step, 100], signs=[1, -1], utilities=[1.0, 0.5])
            optimizer.step()
        runs.append(snapshot(parameters))
    assert_same(runs[1], runs[0])


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(noise, "CPU_PIECE", 4096)  # so that small tensors are shared, too
    results, norms = [], []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            parameters, optimizer = make(lr=0.1, rule="adam")
            run_steps(optimizer, 3)
            results.append(snapshot(parameters))
            norms.append(optimizer.update_norm)
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])
    assert norms[0] == norms[1] == norms[2]


@both
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("master_weights", ["device", "none"])
def test_resuming_from_a_state_dict_is_exact(tmp_path, dtype, rule, master_weights, perturbation):
    options = {"rule": rule, "anchor_decay": 0.1, "dtype": dtype, "master_weights": master_weights, "lr": 0.1}
    options["perturbation"] = perturbation
    whole, uninterrupted = make(**options)
    run_steps(uninterrupted, 5)
    _, first = make(**options)
    run_steps(first, 3)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")

    resumed, second = make(**options)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for step in range(3, 5):
        population = second.ask()
        for member in population:
            second.perturb(member)
        second.tell(population, np.random.default_rng(step).normal(size=5))
        second.step()
    assert_same(snapshot(resumed), snapshot(whole))
    assert second.distance_from_start() == uninterrupted.distance_from_start()


def test_a_state_of_something_else_is_refused():
    _, optimizer = make()
    _, other = make(rule="adam")
    with pytest.raises(ValueError, match="exp_avg.*es_optimizer"):
        optimizer.load_state_dict(other.state_dict())
    parameters = make_parameters()
    del parameters["norm.weight"]
    _, smaller = make(parameters)
    with pytest.raises(ValueError, match="'norm.weight'"):
        optimizer.load_state_dict(smaller.state_dict())


def test_given_dtype_is_what_is_saved_and_loaded():
    parameters, optimizer = make(dtype=torch.bfloat16, lr=1.0)
    run_steps(optimizer, 1)
    working = snapshot(parameters)
    assert working["norm.weight"].dtype == torch.bfloat16
    with optimizer.weights.in_checkpoint_dtype():
        saved = snapshot(parameters)
    assert saved["norm.weight"].dtype == torch.float32
    assert torch.equal(saved["norm.weight"].bfloat16(), working["norm.weight"])
    assert_same(snapshot(parameters), working)

    with optimizer.weights.in_checkpoint_dtype():
        parameters["norm.weight"].data.fill_(1.2345678)
        optimizer.weights.adopt()
    assert parameters["norm.weight"].data.dtype == torch.bfloat16
    optimizer.perturb(Member(1))
    optimizer.restore()
    with optimizer.weights.in_checkpoint_dtype():
        assert torch.equal(parameters["norm.weight"].data, torch.full((33,), 1.2345678))


def test_frozen_parameters_keep_their_precision():
    frozen = nn.Parameter(torch.full((5,), 1.2345678), requires_grad=False)
    _, optimizer = make(dtype=torch.bfloat16, frozen=[frozen])
    assert frozen.dtype == torch.bfloat16
    with optimizer.weights.in_checkpoint_dtype():
        assert torch.equal(frozen.data, torch.full((5,), 1.2345678))
    assert frozen.dtype == torch.bfloat16


def test_rewards_must_be_told():
    _, optimizer = make()
    with pytest.raises(RuntimeError, match="tell"):
        optimizer.step()
    with pytest.raises(ValueError, match="3 members.*has 5"):
        optimizer.tell(optimizer.ask(), [1.0, 2.0, 3.0])


def test_distance_is_measured_well_on_a_sample(monkeypatch):
    monkeypatch.setattr(optimizer_module, "DISTANCE_SAMPLE", 20_000)
    parameters, optimizer = make(lr=1.0)
    start = snapshot(parameters)
    run_steps(optimizer, 2)
    exact = sum(float((parameters[name].data - start[name]).square().sum()) for name in start) ** 0.5
    assert optimizer.distance_from_start() == pytest.approx(exact, rel=0.03)
    assert optimizer.distance_from_start() != exact


@pytest.mark.parametrize("population_size", [4, 30])
def test_distance_is_measured_well_after_low_rank_updates(monkeypatch, population_size):
    # One of 72 weights: with that for a stride, 8 of the 576 columns would stand for all. The error of 2**20 weights,
    # 0.1 %, is eight times as much on a 64th of them
    monkeypatch.setattr(optimizer_module, "DISTANCE_SAMPLE", 2**14)
    for seed in range(6):
        matrix = nn.Parameter(torch.zeros(2048, 576))
        options = {"population_size": population_size, "seed": seed, "perturbation": LowRank(1)}
        _, optimizer = make({"weight": matrix}, lr=1.0, **options)
        run_steps(optimizer, 1, evaluate=False)
        exact = float(torch.linalg.vector_norm(matrix.data))
        assert optimizer.distance_from_start() == pytest.approx(exact, rel=3 * 8 * 0.001)
        assert optimizer.distance_from_start() != exact


def test_a_state_says_on_which_weights_the_distance_is_measured(monkeypatch):
    monkeypatch.setattr(optimizer_module, "DISTANCE_SAMPLE", 2000)
    with monkeypatch.context() as former:
        former.setattr(optimizer_module, "_stride", optimizer_module._spacing)
        parameters, optimizer = make()
        run_steps(optimizer, 2)
    state = optimizer.state_dict()
    formerly = {key: value for key, value in state.items() if key not in ("moves", "stride")}
    for saved in (state, formerly):
        _, loaded = make()
        loaded.load_state_dict(saved)
        assert loaded.distance_from_start() == optimizer.distance_from_start() > 0
        assert loaded.moves == loaded.updates == 2


def test_learning_rate_schedulers_drive_it():
    parameters, optimizer = make(lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)
    before = snapshot(parameters)
    run_steps(optimizer, 1)
    assert_same(snapshot(parameters), before)
    scheduler.step()
    run_steps(optimizer, 1)
    assert not torch.equal(parameters["norm.weight"].data, before["norm.weight"])


def test_it_climbs():
    torch.manual_seed(0)
    target = torch.randn(30)
    parameters = {"weight": nn.Parameter(torch.zeros(30))}
    optimizer = EvolutionStrategy(list(parameters.items()), lr=0.1, sigma=0.1, population_size=40)
    for _ in range(60):
        population = optimizer.ask()
        rewards = []
        for member in population:
            optimizer.perturb(member)
            rewards.append(-float((parameters["weight"].data - target).square().sum()))
        optimizer.tell(population, rewards)
        optimizer.step()
    assert float((parameters["weight"].data - target).norm()) < 0.2 * float(target.norm())


# ---- partitioned parameters ----


def partition(rank: int, processes: int) -> dict[str, nn.Parameter]:
    """What a process has of parameters that are laid out as ZeRO-3 lays them out, with something in the padding."""
    parameters = make_parameters()
    for parameter in parameters.values():
        whole, parameter.ds_shape, parameter.ds_numel = parameter.data.view(-1), parameter.shape, parameter.numel()
        size = -(-whole.numel() // processes)
        part = whole[rank * size : (rank + 1) * size]
        parameter.ds_tensor = torch.cat([part, torch.full((size - len(part),), 1e9)])
        parameter.data = torch.empty(0)
    return parameters


@pytest.fixture
def make_part(monkeypatch):
    """Make the optimizer of a process."""
    monkeypatch.setattr(optimizer_module, "DISTANCE_SAMPLE", 2000)  # so that not every weight is looked at

    def make_part(rank: int, processes: int, **options) -> EvolutionStrategy:
        monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
        _, part = make(partition(rank, processes), **options)
        return part

    return make_part


def assert_parts(parts: list[EvolutionStrategy], whole: EvolutionStrategy) -> None:
    """Put together, the parts are the whole, and padding is left alone."""
    for i, shard in enumerate(whole.weights.shards):
        pieces = [part.weights.shards[i] for part in parts]
        assert torch.equal(torch.cat([piece.trained for piece in pieces]), shard.trained), shard.name
        assert torch.equal(torch.cat([piece.working for piece in pieces]), shard.working), shard.name
        for piece in pieces:
            padding = piece.parameter.ds_tensor[piece.working.numel() :]
            assert torch.equal(padding, torch.full_like(padding, 1e9))


@both
@pytest.mark.parametrize("processes", [1, 2, 7, 50])
@pytest.mark.parametrize("master_weights", ["device", "host", "none"])
def test_parts_are_perturbed_and_updated_like_the_whole(make_part, perturbation, processes, master_weights):
    options = {"perturbation": perturbation, "master_weights": master_weights, "rule": "adam", "anchor_decay": 0.1}
    options |= {"dtype": torch.bfloat16, "lr": 0.02}
    parts = [make_part(rank, processes, **options) for rank in range(processes)]
    _, whole = make(**options)
    for optimizer in [*parts, whole]:
        run_steps(optimizer, 2)
        optimizer.perturb(optimizer.ask().members[0])
    assert_parts(parts, whole)
    assert np.hypot.reduce([part.update_norm for part in parts]) == pytest.approx(whole.update_norm)
    distance = np.hypot.reduce([part.distance_from_start() for part in parts])
    assert distance == pytest.approx(whole.distance_from_start(), rel=0.05)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3), (50, 2)])
def test_a_state_goes_on_in_another_number_of_parts(make_part, before, after):
    options = {"rule": "adam", "anchor_decay": 0.1, "dtype": torch.bfloat16, "lr": 0.02}
    _, whole = make(**options)
    saved = [make_part(rank, before, **options) for rank in range(before)]
    for optimizer in [*saved, whole]:
        run_steps(optimizer, 1)
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in saved]
    loaded = [make_part(rank, after, **options) for rank in range(after)]
    for optimizer in loaded:
        optimizer.load_parts(states)
        assert optimizer.updates == 1
    for optimizer in [*loaded, whole]:
        run_steps(optimizer, 1)
    assert_parts(loaded, whole)
    for name in ("exp_avg", "exp_avg_sq", "start", "anchor"):
        for i, shard in enumerate(whole.weights.shards):
            pieces = [optimizer.state[optimizer.weights.shards[i].parameter][name] for optimizer in loaded]
            assert torch.equal(torch.cat(pieces), whole.state[shard.parameter][name]), (name, shard.name)


def test_a_state_of_which_a_part_is_missing_is_refused(make_part):
    states = [make_part(rank, 3).state_dict() for rank in range(3)]
    _, whole = make()
    with pytest.raises(ValueError, match="it lacks 934 of the numbers of 'weights'"):
        whole.load_parts(states[:1] + states[2:])


def test_an_optimizer_that_begins_again_is_a_new_one_with_these_weights():
    options = {"rule": "adam", "anchor_decay": 0.1, "lr": 0.02}
    parameters, optimizer = make(**options)
    run_steps(optimizer, 2)
    optimizer.begin()
    others, new = make({name: nn.Parameter(data) for name, data in snapshot(parameters).items()}, **options)
    for each in (optimizer, new):
        run_steps(each, 2)
    assert_same(snapshot(parameters), snapshot(others))
    assert optimizer.updates == 2 and optimizer.distance_from_start() == new.distance_from_start()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"perturbation": LowRank(2), "antithetic": True, "population_size": 6},
        {"rule": "momentum", "weight_decay": 0.1},
        {"rule": "adam", "anchor_decay": 30.0, "anchor_penalty": "l1"},
        {"dtype": torch.bfloat16, "master_weights": "host", "anchor_decay": 0.1},
    ],
    ids=["sgd", "low_rank", "momentum", "adam", "bfloat16"],
)
def test_a_step_that_is_previewed_is_the_step_and_leaves_nothing(options):
    options = dict(options)
    decay = options.pop("weight_decay", 0.0)
    parameters, optimizer = make(**options)
    for group in optimizer.param_groups:
        group["weight_decay"] = decay
    run_steps(optimizer, 2)
    optimizer.tell(optimizer.ask(), np.random.default_rng(7).normal(size=optimizer.population_size))
    before, state = snapshot(parameters), copy.deepcopy(optimizer.state_dict())
    found = {}
    for scale in (0.5, 2.0):
        with optimizer.previewed(scale):
            found[scale] = snapshot(parameters)
        assert_same(snapshot(parameters), before)
    after = optimizer.state_dict()
    assert {key: after[key] for key in after if key != "slices"} == {
        key: state[key] for key in state if key != "slices"
    }
    for key, (*_, values) in state["slices"].items():
        assert torch.equal(after["slices"][key][-1], values), key
    optimizer.step_scale = 2.0
    optimizer.step()
    assert_same(snapshot(parameters), found[2.0])
    assert not torch.equal(found[0.5]["linear.weight"], found[2.0]["linear.weight"])


def test_step_scale_is_a_factor_of_the_learning_rate():
    parameters, optimizer = make(lr=0.02)
    others, other = make(lr=0.01)
    other.step_scale = 2.0
    run_steps(optimizer, 1)
    run_steps(other, 1)
    assert_same(snapshot(others), snapshot(parameters))


def test_without_masters_no_step_is_previewed():
    _, optimizer = make(master_weights="none")
    optimizer.tell(optimizer.ask(), np.arange(5.0))
    with pytest.raises(RuntimeError, match="master weights"), optimizer.previewed(1.0):
        pass
