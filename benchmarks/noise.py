"""
Noise, perturbation and update against torch.randn, side by side: `python benchmarks/noise.py`.

Every figure is the median of several rounds; a round times both sides one after the other.
"""

import statistics
import time
from collections.abc import Callable

import torch

from es_trainer.evolution import EvolutionStrategy, Member
from es_trainer.noise import noise


WEIGHTS = 135_000_000  # as many as SmolLM2-135M has
POPULATION = 30
ROUNDS = 7


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, ...]:
    """Medians of our seconds, of theirs, and of theirs over ours."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return tuple(map(statistics.median, zip(*((a, b, b / a) for a, b in pairs), strict=True)))


def fill() -> None:
    out = torch.zeros(WEIGHTS)
    speeds = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        mine, randn, ratio = compare(lambda: noise.fill(out, "weight", 1), lambda: torch.randn(WEIGHTS, out=out))
        speeds[threads] = WEIGHTS / mine
        print(
            f"fill, {threads} thread(s): {WEIGHTS / mine / 1e9:.2f} G/s; "
            f"torch.randn: {WEIGHTS / randn / 1e9:.2f} G/s; {ratio:.1f} times faster"
        )
    print(f"fill, two threads over one: {speeds[2] / speeds[1]:.2f}")


def parameters(dtype: torch.dtype) -> list[tuple[str, torch.nn.Parameter]]:
    """The weights in 30 matrices."""
    return [(f"layers.{i}.weight", torch.nn.Parameter(torch.zeros(WEIGHTS // 30, dtype=dtype))) for i in range(30)]


def perturb(dtype: torch.dtype) -> None:
    named = parameters(dtype)
    optimizer = EvolutionStrategy(named, sigma=1e-3)

    def reference() -> None:
        for _, parameter in named:
            parameter.data.add_(torch.randn(parameter.shape, dtype=dtype), alpha=1e-3)

    mine, theirs, ratio = compare(lambda: optimizer.perturb(Member(1)), reference)
    print(f"perturb {WEIGHTS:,} {dtype} weights: {mine:.3f} s; randn + add_: {theirs:.3f} s; {ratio:.1f} times faster")


def update(dtype: torch.dtype) -> None:
    named = parameters(dtype)
    optimizer = EvolutionStrategy(named, lr=1e-3, population_size=POPULATION)
    utilities = torch.linspace(-1, 1, POPULATION).tolist()

    def mine() -> None:
        optimizer.tell(optimizer.ask(), utilities)
        optimizer.step()

    def reference() -> None:
        for seed, utility in enumerate(utilities):
            torch.manual_seed(seed)
            for _, parameter in named:
                parameter.data.add_(torch.randn(parameter.shape, dtype=dtype), alpha=1e-3 * utility / POPULATION)

    own, theirs, ratio = compare(mine, reference, rounds=3)
    print(
        f"update {WEIGHTS:,} {dtype} weights, N={POPULATION}: {own:.2f} s; {POPULATION} x (randn + add_): "
        f"{theirs:.2f} s; {ratio:.1f} times faster"
    )


if __name__ == "__main__":
    print(f"CPU capability: {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    fill()
    for dtype in (torch.float32, torch.bfloat16):
        perturb(dtype)
        update(dtype)
