"""The noise contract: `noise(seed, parameter name, flat index)` is a pure function.

Philox4x32-10 with the seed as key and (index block, hash of the name) as counter, Box-Muller to float32. Any slice of
any parameter can be made without the rest, and neither the process count, the shard layout, the chunk size nor the
order of iteration changes a value. No two parameters share noise. The words are the same on every machine; normals are
the same up to the rounding of float32 on another kind of device, or on a CPU without fused multiply-add.

Sums that are written to bfloat16 or float16 can be rounded up or down at random, also as a pure function of seed, name
and index.
"""

import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np
import torch

from .jobs import Addition, Product


T = TypeVar("T")

VERSION = 1  # of the contract: another number for whatever changes a bit of a perturbation or of an update

CPU_PIECE = 32768  # weights: stays in the cache, and torch works on it without starting threads of its own
CUDA_PIECE = 1 << 24

_scratch = threading.local()


@functools.cache
def stream(name: str) -> int:
    """64-bit hash of a parameter's name, the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def rounding_key(seed: int, name: str) -> int:
    """The key of the stochastic rounding of a parameter with a member's noise, 64 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little")


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="es_trainer-noise")


def for_spans(function: Callable[[int, int], T], size: int) -> list[T]:
    """Call `function(start, stop)` on as many equal spans of `range(size)` as torch has threads, side by side.

    Returns:
        `list`: what the calls returned, in the order of the spans.
    """
    count = min(torch.get_num_threads(), -(-size // CPU_PIECE))
    if count <= 1:
        return [function(0, size)]
    length = -(-size // (count * CPU_PIECE)) * CPU_PIECE
    spans = [_threads(count).submit(function, i, min(i + length, size)) for i in range(0, size, length)]
    try:
        return [span.result() for span in spans]
    finally:
        wait(spans)  # if this is interrupted, nobody is to write behind the back of what undoes it


def piece_size(device: torch.device) -> int:
    """Weights that are worked on at once, with scratch memory for them."""
    return CPU_PIECE if device.type == "cpu" else CUDA_PIECE


def for_pieces(function: Callable[[int, int], T], size: int, device: torch.device) -> list[T]:
    """Call `function(start, stop)` on consecutive pieces of `range(size)` that are small enough for scratch memory.

    On CPU the pieces are shared by the threads; their bounds do not depend on the number of threads.

    Returns:
        `list`: what the calls returned, in the order of the pieces.
    """
    step = piece_size(device)

    def span(start: int, stop: int) -> list[T]:
        return [function(i, min(i + step, stop)) for i in range(start, stop, step)]

    if device.type != "cpu":
        return span(0, size)
    return [result for results in for_spans(span, size) for result in results]


def scratch(size: int, device: torch.device) -> torch.Tensor:
    """A float32 tensor whose contents last until the next call from the same thread."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.float32, device=device)
    buffer = vars(_scratch).get("buffer")
    if buffer is None or len(buffer) < size:
        buffer = _scratch.buffer = torch.empty(max(size, CPU_PIECE), dtype=torch.float32, device="cpu")
    return buffer[:size]


def add(
    source: torch.Tensor | None,
    target: torch.Tensor,
    name: str,
    seeds: Sequence[int],
    coefficients: Sequence[float],
    start: int = 0,
    rounding: int | None = None,
) -> None:
    """
    Write `target = source + sum_k coefficients[k] * noise(seeds[k], name)` in one pass over the weights; see
    [`Addition`]. `name` is that of the parameter.

    Raises:
        `ValueError`: If the weights are on a device for which there is no kernel.
    """
    write_each([Addition(source, target, stream(name), seeds, coefficients, start, rounding)])


def write_each(jobs: Sequence[Addition | Product]) -> None:
    """
    Write several tensors; see [`Addition`] and [`Product`]. On a GPU, jobs of a kind and of the same dtypes take one
    launch. On every device, a value of a product is one chain of additions, whatever slice is asked for.

    Raises:
        `ValueError`: If weights are on a device for which there is no kernel.
    """
    on_gpu = []
    for job in jobs:
        if job.target.numel() == 0:  # a process's part of a small parameter
            continue
        if _is_on_gpu(job.target):
            on_gpu.append(job)
        elif isinstance(job, Addition):
            _add_cpu(*job)
        else:
            _add_product_cpu(*job)
    if on_gpu:
        from . import cuda

        cuda.write_each(on_gpu)


def _is_on_gpu(target: torch.Tensor) -> bool:
    if target.device.type not in ("cpu", "cuda"):
        raise ValueError(f"Weights are on device {target.device}, but noise can be made on 'cpu' and 'cuda' only.")
    return target.device.type == "cuda"


def fill(target: torch.Tensor, name: str, seed: int, start: int = 0) -> torch.Tensor:
    """Write `noise(seed, name)` from flat index `start` on into the flat tensor `target` and return it."""
    add(None, target, name, [seed], [1.0], start)
    return target


def fill_each(targets: Sequence[torch.Tensor], names: Sequence[str], seeds: Sequence[int]) -> None:
    """
    Write `noise(seeds[k], names[i])` into row k of the float32 tensor `targets[i]`, for small rows. On a GPU, all of
    them are written in one launch.
    """
    on_gpu = []
    for target, name in zip(targets, names, strict=True):
        if _is_on_gpu(target):
            rows = zip(target, seeds, strict=True)
            on_gpu += [Addition(None, row, stream(name), [seed], [1.0]) for row, seed in rows]
        else:
            from . import cpu

            cpu.fill_each(target.numpy(), np.uint64(stream(name)), np.array(seeds, dtype=np.uint64))
    write_each(on_gpu)


def _add_cpu(source, target, stream, seeds, coefficients, start, rounding):
    # Numba is imported where it is used: a machine that trains on CUDA does not need it
    from . import cpu

    seeds = np.array(seeds, dtype=np.uint64)
    coefficients = np.array(coefficients, dtype=np.float32)
    stream = np.uint64(stream)

    if target.dtype == torch.bfloat16 and (source is None or source.dtype == torch.float32):
        values = np.empty(0, dtype=np.float32) if source is None else source.numpy()
        bits = target.view(torch.uint16).numpy()
        key = np.uint64(rounding or 0)

        def span(low: int, high: int) -> None:
            piece, first = values[low:high], start + low
            cpu.add_bfloat16(piece, bits[low:high], first, stream, seeds, coefficients, rounding is not None, key)

        for_spans(span, target.numel())
        return

    def kernel(values: np.ndarray, out: np.ndarray, low: int) -> None:
        cpu.add(values, out, start + low, stream, seeds, coefficients)

    _on_cpu(kernel, source, target, start, rounding)


def _add_product_cpu(source, target, left, right, start, rounding):
    from . import cpu

    left, right = left.flatten(0, 1).numpy(), right.numpy()

    def kernel(values: np.ndarray, out: np.ndarray, low: int) -> None:
        cpu.add_product(values, out, start + low, left, right)

    _on_cpu(kernel, source, target, start, rounding)


def _on_cpu(
    kernel: Callable[[np.ndarray, np.ndarray, int], None],
    source: torch.Tensor | None,
    target: torch.Tensor,
    start: int = 0,
    rounding: int | None = None,
) -> None:
    """
    Run a float32 kernel over tensors of any floating dtype, shared by torch's number of threads.

    Args:
        kernel (`Callable`):
            Called with a piece of the source (empty for zeros; it may be the target itself), the piece of the target
            to write, and where in the target that begins.
        source (`torch.Tensor` or `None`):
            Flat tensor of the target's shape.
        target (`torch.Tensor`):
            Flat tensor. What the kernel writes is rounded once.
        start (`int`, *optional*, defaults to `0`):
            Flat index of the target's first element in the whole parameter.
        rounding (`int`, *optional*):
            Key of a stochastic rounding; see `add`.
    """
    from . import cpu

    dither = {torch.bfloat16: cpu.dither_bfloat16, torch.float16: cpu.dither_float16}
    nothing = np.empty(0, dtype=np.float32)

    def exact(low: int, high: int) -> None:
        values = nothing if source is None else source[low:high].numpy()
        kernel(values, target[low:high].numpy(), low)

    def rounded(low: int, high: int) -> None:
        values = scratch(high - low, target.device)
        if source is not None:
            values.copy_(source[low:high])
        array = values.numpy()
        kernel(nothing if source is None else array, array, low)
        if rounding is not None:
            dither[target.dtype](array.view(np.uint32), start + low, np.uint64(rounding))
        target[low:high].copy_(values)

    if target.dtype not in dither:
        rounding = None
    if target.dtype == torch.float32 and (source is None or source.dtype == torch.float32):
        for_spans(exact, target.numel())
    else:
        for_pieces(rounded, target.numel(), target.device)
