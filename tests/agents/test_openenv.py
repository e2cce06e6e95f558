"""Environments on a server of OpenEnv: a client for each rollout."""

import threading
import time

import pytest
import uvicorn
from calling import PROMPTS, calling_model, calling_tokenizer, needs_tools, trained_weights
from datasets import Dataset


openenv = pytest.importorskip("openenv.core", reason="`make slow` installs it")

pytestmark = [needs_tools, pytest.mark.slow]

TOGETHER = 2 * 4  # prompts, and members of a population batch


class Addition(openenv.Action):
    a: int
    b: int


class Total(openenv.Observation):
    total: int


class Adder(openenv.Environment):
    """What the server has for each client. The reward is the total."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **row) -> Total:
        self.total = 0
        return Total(total=0)

    def step(self, action: Addition, timeout_s=None, **options) -> Total:
        self.total += action.a + action.b
        return Total(total=self.total, reward=float(self.total))

    @property
    def state(self) -> openenv.State:
        return openenv.State()


@pytest.fixture
def serve():
    """Run a server for at most so many clients."""
    running = []

    def start(**options) -> str:
        app = openenv.create_app(Adder, Addition, Total, **options)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        _, port = server.servers[0].sockets[0].getsockname()
        return f"http://127.0.0.1:{port}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.fixture
def act(trainer, serve):
    """Train in the server's environment. Returns the trainer, and the clients."""
    clients = []

    def run(served: dict, **options):
        url = serve(**served)

        class RemoteSums:
            def __init__(self):
                self.client = openenv.GenericEnvClient(base_url=url).sync()
                clients.append(self.client)

            def reset(self, **row):
                self.result = self.client.reset()

            def add(self, a: int, b: int) -> int:
                """
                Add two numbers.

                Args:
                    a: The first.
                    b: The second.
                """
                self.result = self.client.step({"a": a, "b": b})
                return self.result.observation["total"]

            def get_reward(self) -> float:
                return self.result.reward

        _, length = trained_weights()
        given = {"model": calling_model(), "processing_class": calling_tokenizer(), "eval_dataset": None}
        given |= {"train_dataset": Dataset.from_dict({"prompt": PROMPTS}), "reward_funcs": None, "sigma": 1e-4}
        given |= {"max_completion_length": length + 8, "environment_factory": RemoteSums, "max_steps": 2}
        made = trainer(**given | options)
        made.train()
        return made, clients

    yield run
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    ("together", "options"), [(2, {"population_batch_size": 1}), (TOGETHER, {"perturbation": "low_rank"})]
)
def test_a_server_gives_the_reward(act, together, options):
    run, clients = act({"max_concurrent_envs": 2 * together}, **options)
    rewards = [log["rewards/RemoteSums/mean"] for log in run.state.log_history if "reward" in log]
    assert rewards == [3.5, 3.5]  # of 5 and 2: totals of one rollout each
    assert len(clients) == 2 * together


@pytest.mark.parametrize("served", [{}, {"max_concurrent_envs": TOGETHER}])
def test_a_server_for_too_few_clients_ends_training(act, served):
    with pytest.raises(RuntimeError, match="Server at capacity"):
        act(served, perturbation="low_rank")
