"""Training with vLLM servers that evaluate groups of members as adapters."""

import pytest
import tiny
from conftest import letters, logs, make_model
from test_servers import Process, assert_alike
from test_servers import start as start  # noqa: F401 (a fixture)

from es_trainer.engines.vllm_client import ServerError


LORA = ("--enable-lora", "--max-loras", "3", "--max-lora-rank", "8")


@pytest.fixture(scope="module")
def servers():
    started = [Process(*LORA), Process(*LORA)]
    try:
        for server in started:
            server.wait()
        yield started
    finally:
        for server in started:
            server.kill()


@pytest.fixture
def plain(trainer):
    """A run with Transformers that trains what adapters can carry, too."""

    def run(**options):
        model = make_model(**tiny.HEADS)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "proj" in name
        made = trainer(model, perturbation="low_rank", **options)
        made.train()
        return made

    return run


def test_a_server_answers_for_a_group_of_members(servers, start, plain, tmp_path, caplog):  # noqa: F811
    first, second = servers
    options = {"population_size": 8, "max_steps": 5, "evaluate_center": True, "num_generations": 2}
    seen = {}

    def reward(completions, trainer_state, **kwargs):
        step = trainer_state.global_step + 1
        seen[step] = seen.get(step, 0) + 1
        if step == 2 and seen[step] == 1:
            second.kill()
            second.start()
            second.wait()
            mine.delay = 0.5  # or the other would have done everything before this one has loaded the model
        return letters(completions)

    reward.__name__ = "letters"
    mine = start(first, second, perturbation="low_rank", vllm_lora=True, reward_funcs=reward, **options)
    assert "6 parameters that adapters cannot carry stay as they are" in caplog.text
    sizes = []
    for server in mine.engine.replicas.servers:
        install = server.call
        server.call = lambda method, *args, call=install: (
            (sizes.append(len(args[0])) if method == "install" else None) or call(method, *args)
        )
    mine.train()
    theirs = plain(**options)
    assert sizes[:3] and set(sizes) == {2, 3}
    assert {1, 5} <= set(mine.answered[second.url])
    assert_alike(mine, theirs, tmp_path / "saved")
    assert len({log["reward_std"] for log in logs(mine)}) == 5


def test_servers_with_too_few_slots(servers, start):  # noqa: F811
    options = {"perturbation": "low_rank", "vllm_lora": True}
    with pytest.raises(ServerError, match="has adapters for 3 members: start it with a larger --max-loras"):
        start(servers[0], population_batch_size=4, **options)
    with pytest.raises(ServerError, match="at most 8, but `perturbation_rank=9`: .* a larger --max-lora-rank"):
        start(servers[0], perturbation_rank=9, **options)
