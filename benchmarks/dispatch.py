"""
How long a step takes on servers that help each other: `python benchmarks/dispatch.py`, some minutes.

The servers are stand-ins that sleep; what dispatches members to them is that of a run. Lengths of completions are
lognormal, each the product of one factor of the member and one of its own. The seconds of a share are those of its
perturbation and either the sum of its lengths (a server with more completions than it generates at once) or the
longest (a server to which more completions at once cost nothing). Printed are medians over seeds: the time of a step
relative to that of a plain queue, which gives each member to one server, with the same lengths.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from es_trainer.engines.vllm_client import Cancelled
from es_trainer.engines.vllm_dispatch import Job, dispatch


class Server:
    """Sleeps instead of completing prompts."""

    def __init__(self, number: int, slowness: float = 1.0):
        self.url = f"server {number}"
        self.slowness = slowness
        self.connected = True
        self.late = False
        self.lock = threading.Lock()
        self._cancelled = threading.Event()

    def complete(self, seconds: float) -> None:
        """Sleep, unless it is cancelled."""
        self._cancelled.clear()
        if self._cancelled.wait(seconds * self.slowness):
            raise Cancelled(self.url)

    def cancel(self) -> None:
        self._cancelled.set()


class Servers:
    """Servers that are never lost or behind."""

    def __init__(self, servers: Sequence[Server]):
        self.servers = servers

    def catch_up(self, server: Server) -> bool:
        return True


def step(servers: Servers, lengths: np.ndarray, cost: Callable, noise: float, helped: bool) -> tuple[float, int]:
    """
    Evaluate members.

    Args:
        servers ([`Servers`]):
            The servers.
        lengths (`np.ndarray` of shape `(members, prompts)`):
            Seconds of each completion.
        cost (`Callable`):
            Makes seconds of a share of its lengths.
        noise (`float`):
            Seconds of a perturbation.
        helped (`bool`):
            Whether servers without work help others.

    Returns:
        `tuple[float, int]`: seconds, and how many shares there were.
    """

    def complete(job: Job, server: Server) -> Job:
        server.complete(noise + cost(lengths[job.members[0], list(job.prompts)]))
        return job

    jobs = [Job((member,), range(lengths.shape[1])) for member in range(len(lengths))]
    start = time.monotonic()
    done = list(dispatch(servers, jobs, complete, splits=helped, repeats=helped))
    return time.monotonic() - start, len(done)


def draw(seed: int, members: int, prompts: int, spread: float, own_spread: float) -> np.ndarray:
    """Lengths of completions, with standard deviations of the logarithm."""
    random = np.random.default_rng(seed)
    return random.lognormal(0, spread, (members, 1)) * random.lognormal(0, own_spread, (members, prompts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=8)
    parser.add_argument("--members", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--spreads", type=float, nargs="+", default=[0.4, 0.8, 1.2], help="of the members")
    parser.add_argument("--own_spread", type=float, default=0.8, help="of the completions")
    parser.add_argument("--noise", type=float, default=0.05, help="of the mean time of a member")
    parser.add_argument("--slowness", type=float, nargs="+", default=[1.0, 6.0], help="of one of the servers")
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--scale", type=float, default=0.05, help="mean seconds of a member")
    options = parser.parse_args()
    for name, cost in (("sum", np.sum), ("longest", np.max)):
        for spread in options.spreads:
            for slowness in options.slowness:
                relative, shares = [], []
                for seed in range(options.seeds):
                    lengths = draw(seed, options.members, options.prompts, spread, options.own_spread)
                    lengths *= options.scale / np.mean([cost(own) for own in lengths])
                    times = []
                    for helped in (False, True):
                        servers = [Server(i, slowness if i == 0 else 1.0) for i in range(options.servers)]
                        noise = options.noise * options.scale
                        seconds, count = step(Servers(servers), lengths, cost, noise, helped)
                        times.append(seconds)
                    relative.append(times[1] / times[0])
                    shares.append(count)
                low, middle, high = statistics.quantiles(relative, n=4)
                print(
                    f"time={name} spread={spread} slowness={slowness}: {middle:.2f} of a plain queue's time, "
                    f"quartiles {low:.2f} and {high:.2f}, {statistics.median(shares):.0f} shares",
                    flush=True,
                )
