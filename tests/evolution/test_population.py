import pytest

from es_trainer.evolution import Population


def test_population_depends_on_seed_and_step_only():
    assert Population.sample(6, seed=1, step=2) == Population.sample(6, seed=1, step=2)


def test_no_seed_is_drawn_twice():
    populations = [Population.sample(30, seed=seed, step=step) for seed in range(20) for step in range(50)]
    seeds = [member.seed for population in populations for member in population]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_antithetic_members_come_in_mirrored_pairs():
    members = Population.sample(8, seed=0, step=0, antithetic=True).members
    assert [member.sign for member in members] == [1, -1] * 4
    assert [member.seed for member in members[::2]] == [member.seed for member in members[1::2]]
    assert len({member.seed for member in members}) == 4


def test_steps_share_a_population_but_not_random_numbers():
    steps = [Population.sample(6, seed=1, step=step, steps_per_population=3) for step in range(7)]
    fresh = [Population.sample(6, seed=1, step=step) for step in range(7)]
    assert [population.members for population in steps] == [fresh[i].members for i in (0, 0, 0, 3, 3, 3, 6)]
    assert [population.seed for population in steps] == [population.seed for population in fresh]


@pytest.mark.parametrize("antithetic", [False, True])
def test_random_numbers_of_a_fresh_population_are_those_of_its_first_member(antithetic):
    for size in (2, 4, 30):  # as they were before populations could be used again: other bits would be another run
        population = Population.sample(size, seed=3, step=5, antithetic=antithetic)
        assert population.seed == population.members[0].seed
