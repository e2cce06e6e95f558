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
