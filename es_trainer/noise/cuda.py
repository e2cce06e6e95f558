"""The noise contract on CUDA: Philox4x32-10 and Box-Muller in Triton, one program for each block of 4096 weights.

The values are those of the CPU kernel up to the rounding of float32: the same words, the same polynomials. One launch
writes many tensors: what a program works on, it reads from a table.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import triton
import triton.language as tl

from .jobs import Addition, Product


Job = TypeVar("Job", Addition, Product)


LANES = tl.constexpr(1024)  # counters in a block
BLOCK = tl.constexpr(4 * 1024)  # normals in a block: counter i gives the normals i, i + 1024, i + 2048 and i + 3072

SQRT_HALF = tl.constexpr(0x3F3504F3)  # the bits of float32(sqrt(0.5))
SQRT_HALF_2_24 = tl.constexpr(0x3F3504F3 + (24 << 23))  # and of sqrt(0.5) * 2**24
MANTISSA = tl.constexpr(0x007FFFFF)
LOG_SCALE = tl.constexpr(-2 * math.log(2))
ANGLE_SCALE = tl.constexpr(math.pi / 2**33)


@triton.jit
def box_muller(w0, w1):
    """Two standard normals from two words; see the CPU kernel."""
    u = (w0 >> 8).to(tl.float32) + 0.5
    bits = u.to(tl.int32, bitcast=True) - SQRT_HALF_2_24
    exponent = (bits >> 23).to(tl.float32)
    m = ((bits & MANTISSA) + SQRT_HALF).to(tl.float32, bitcast=True) - 1
    m2 = m * m
    y0 = -0.6666942981228132 * m + 1.0000064687382242
    y1 = -0.39813766374512474 * m + 0.4994245698915348
    y2 = -0.32361001852293554 * m + 0.34486449893513514
    y = ((0.20164754509051388 * m2 + y2) * m2 + y1) * m2 + y0
    # Not `tl.sqrt`, which is approximate on GPUs
    radius = tl.sqrt_rn(exponent * LOG_SCALE + (y * m2 - (m + m)))
    radius = tl.where(w1 >> 31 == 1, -radius, radius)

    x = (w1 << 2).to(tl.int32, bitcast=True).to(tl.float32) * ANGLE_SCALE
    x2 = x * x
    sin = ((-1.9517283822e-4 * x2 + 8.332178038e-3) * x2 - 1.6666654942e-1) * (x2 * x) + x
    cos = ((-1.3597809512e-3 * x2 + 4.1656293613e-2) * x2 - 4.9999894767e-1) * x2 + 1
    exchange = (w1 >> 30) & 1 == 1
    a, b = radius * cos, radius * sin
    return tl.where(exchange, b, a), tl.where(exchange, a, b)


@triton.jit
def inside(index, size):
    return (index >= 0) & (index < size)


@triton.jit
def load(source, index, mask):
    if source is None:
        return tl.zeros(index.shape, tl.float32)
    else:  # without it, this would be compiled for `None`, too
        return tl.load(source + index, mask=mask).to(tl.float32)


@triton.jit
def dither(values, index, key, small: tl.constexpr):
    """Round float32 values to bfloat16 ones, or float16 ones if `small`, up or down at random; see the CPU kernel."""
    bits = values.to(tl.uint32, bitcast=True)
    x = index.to(tl.uint32) ^ key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x + (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    if small:
        rounded = (bits + (x & 0x1FFF)) & 0xFFFFE000
        steps = tl.abs(values) * 16777216.0 + (x >> 8).to(tl.float32) * 5.9604644775390625e-08
        steps = tl.minimum(steps, 2048.0).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
        steps = steps.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
        rounded = tl.where((bits & 0x7FFFFFFF) < 0x38800000, steps, rounded)
    else:
        rounded = (bits + (x & 0xFFFF)) & 0xFFFF0000
    rounded = tl.where((bits & 0x7F800000) == 0x7F800000, bits, rounded)
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def store(target, index, mask, values, start, key, stochastic: tl.constexpr):
    if stochastic:
        values = dither(values, start + index, key, target.dtype.element_ty == tl.float16)
    tl.store(target + index, values.to(target.dtype.element_ty), mask=mask)


# ---- a table of jobs ----

# A table is one tensor of 64-bit numbers: the first program of each job, the columns of each job, and the seeds and
# coefficients that those point to. There is room for `jobs` of them, a power of two: others begin after all programs.
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ALIGNMENT = tl.constexpr(16)  # multiples of so many bytes or weights can be read and written as vectors


@triton.jit
def find(table, jobs: tl.constexpr, columns: tl.constexpr):
    """Where the columns of this program's job are, and the number of the program among those of the job."""
    program = tl.program_id(0).to(tl.int64)
    job = tl.sum((tl.load(table + tl.arange(0, jobs)) <= program).to(tl.int32)) - 1
    return table + jobs + job * columns, program - tl.load(table + job)


@triton.jit
def read(column, aligned: tl.constexpr):
    number = tl.load(column)
    return tl.multiple_of(number, ALIGNMENT) if aligned else number


@triton.jit
def read_tensor(column, dtype: tl.constexpr, aligned: tl.constexpr):
    if dtype is None:
        return None
    else:
        address = tl.load(column).to(tl.pointer_type(dtype))
        return tl.multiple_of(address, ALIGNMENT) if aligned else address


def _launch(jobs: Sequence[Job], kind: Callable[[Job], tuple[Any, ...]], launch: Callable[..., None]) -> None:
    """Launch a kernel for all jobs of the same device, dtypes and `kind` together."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        source = None if job.source is None else TYPES[job.source.dtype]
        dithers = job.rounding is not None and job.target.dtype in (torch.bfloat16, torch.float16)
        key = (job.target.device, source, TYPES[job.target.dtype], dithers, *kind(job))
        groups.setdefault(key, []).append(job)
    for (device, *constants), group in groups.items():
        # Triton launches on the current device, which need not be the target's
        with torch.cuda.device_of(group[0].target):
            launch(group, device, constants)


def _is_aligned(job: Job, *numbers: int) -> bool:
    numbers = (*numbers, job.start, job.target.numel(), _address(job.source), _address(job.target))
    return all(number % ALIGNMENT.value == 0 for number in numbers)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _table(
    firsts: list[int], columns: list[list[int]], device: torch.device, more: Sequence[int] = ()
) -> torch.Tensor:
    end = np.iinfo(np.int64).max
    padding = [end] * (triton.next_power_of_2(len(firsts)) - len(firsts))
    numbers = [*firsts, *padding, *itertools.chain.from_iterable(columns), *more]
    table = torch.from_numpy(np.array(numbers, dtype=np.uint64).view(np.int64))
    # Without `non_blocking` each call would wait for all work that the device has been given
    return table.to(device, non_blocking=True)


def write_each(jobs: Sequence[Addition | Product]) -> None:
    """
    Write several tensors, all of a kind and of the same dtypes in one launch.

    Args:
        jobs (`Sequence[Addition | Product]`):
            What to write; targets are not empty.
    """
    _launch([job for job in jobs if isinstance(job, Addition)], _kind_of_addition, _launch_additions)
    _launch([job for job in jobs if isinstance(job, Product)], _kind_of_product, _launch_products)


# ---- noise ----

ADDITION = tl.constexpr(8)  # columns


@triton.jit
def add_kernel(
    table,
    jobs: tl.constexpr,
    source_type: tl.constexpr,
    target_type: tl.constexpr,
    stochastic: tl.constexpr,
    aligned: tl.constexpr,
):
    job, program = find(table, jobs, ADDITION)
    source, target = read_tensor(job, source_type, aligned), read_tensor(job + 1, target_type, aligned)
    size, start = read(job + 2, aligned), read(job + 3, aligned)
    stream, key = tl.load(job + 4).to(tl.uint64, bitcast=True), tl.load(job + 5).to(tl.uint64, bitcast=True)
    seeds, members = table + tl.load(job + 6), tl.load(job + 7)

    # 64 bits: a parameter may have more than 2**31 elements
    block = start // BLOCK + program
    counter = block * LANES + tl.arange(0, LANES)
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = stream.to(tl.uint32), (stream >> 32).to(tl.uint32)

    i0 = block * BLOCK - start + tl.arange(0, LANES)
    i1, i2, i3 = i0 + LANES, i0 + 2 * LANES, i0 + 3 * LANES
    m0, m1, m2, m3 = inside(i0, size), inside(i1, size), inside(i2, size), inside(i3, size)
    t0, t1, t2, t3 = load(source, i0, m0), load(source, i1, m1), load(source, i2, m2), load(source, i3, m3)
    for k in range(members):
        w0, w1, w2, w3 = tl.philox(tl.load(seeds + k).to(tl.uint64, bitcast=True), c0, c1, c2, c3, 10)
        c = tl.load(seeds + members + k).to(tl.int32).to(tl.float32, bitcast=True)
        z0, z1 = box_muller(w0, w1)
        z2, z3 = box_muller(w2, w3)
        t0 += c * z0
        t1 += c * z1
        t2 += c * z2
        t3 += c * z3
    store(target, i0, m0, t0, start, key, stochastic)
    store(target, i1, m1, t1, start, key, stochastic)
    store(target, i2, m2, t2, start, key, stochastic)
    store(target, i3, m3, t3, start, key, stochastic)


def _kind_of_addition(job: Addition) -> tuple[Any, ...]:
    return (_is_aligned(job),)


def _launch_additions(jobs: list[Addition], device: torch.device, constants: list[Any]) -> None:
    count = triton.next_power_of_2(len(jobs))
    members: list[int] = []
    places: dict[tuple[tuple[int, ...], tuple[float, ...]], int] = {}  # of seeds and coefficients, which jobs share
    firsts, columns, programs = [], [], 0
    for source, target, stream, seeds, coefficients, start, rounding in jobs:
        own = (tuple(seeds), tuple(coefficients))
        if own not in places:
            places[own] = count + len(jobs) * ADDITION.value + len(members)
            members += [*seeds, *np.array(coefficients, dtype=np.float32).view(np.uint32).tolist()]
        firsts.append(programs)
        programs += triton.cdiv(start + target.numel(), BLOCK.value) - start // BLOCK.value
        addresses = _address(source), _address(target)
        columns.append([*addresses, target.numel(), start, stream, rounding or 0, places[own], len(seeds)])
    # Fused multiply-adds round differently, and whether they are the default depends on Triton's version
    add_kernel[(programs,)](_table(firsts, columns, device, members), count, *constants, enable_fp_fusion=True)


# ---- products ----

TILE = 4096  # values of a product that a program computes
PRODUCT = tl.constexpr(11)  # columns


@triton.jit
def product_kernel(
    table,
    jobs: tl.constexpr,
    source_type: tl.constexpr,
    target_type: tl.constexpr,
    stochastic: tl.constexpr,
    aligned: tl.constexpr,
    width: tl.constexpr,
    height: tl.constexpr,
):
    # A value is one chain of fused multiply-adds over the terms, in their order, as on CPU: those of cuBLAS hang on
    # the shape, and on whether TF32 is allowed
    job, program = find(table, jobs, PRODUCT)
    source, target = read_tensor(job, source_type, aligned), read_tensor(job + 1, target_type, aligned)
    size, start, key = read(job + 2, aligned), read(job + 3, aligned), tl.load(job + 4).to(tl.uint64, bitcast=True)
    left, right = read_tensor(job + 5, tl.float32, False), read_tensor(job + 6, tl.float32, aligned)
    rows, columns, terms, first = tl.load(job + 7), read(job + 8, aligned), tl.load(job + 9), tl.load(job + 10)

    # Tiles are numbered from the parameter's first row on, and none lies in two matrices
    across = tl.cdiv(columns, width)
    tile = first + program // across
    tiles = tl.cdiv(rows, height)
    matrix = tile // tiles
    row = (tile - matrix * tiles) * height + tl.arange(0, height)
    column = program % across * width + tl.arange(0, width)
    in_rows, in_columns = row < rows, column < columns
    row = matrix * rows + row
    index = row[:, None] * columns + column[None, :] - start
    mask = in_rows[:, None] & in_columns[None, :] & inside(index, size)
    a = left + row * terms
    b = right + matrix * terms * columns + column
    total = load(source, index, mask)
    for k in range(terms):
        total = tl.fma(
            tl.broadcast_to(tl.load(a + k, mask=in_rows, other=0.0)[:, None], (height, width)),
            tl.broadcast_to(tl.load(b, mask=in_columns, other=0.0)[None, :], (height, width)),
            total,
        )
        b += columns
    store(target, index, mask, total, start, key, stochastic)


def _kind_of_product(job: Product) -> tuple[Any, ...]:
    columns = job.right.shape[2]
    return _is_aligned(job, columns, _address(job.right)), min(128, triton.next_power_of_2(columns))


def _launch_products(jobs: list[Product], device: torch.device, constants: list[Any]) -> None:
    width = constants[-1]
    height = TILE // width
    firsts, columns, programs = [], [], 0
    for source, target, left, right, start, rounding in jobs:
        _, rows, terms = left.shape
        first, last = (_tile(index, rows, right.shape[2], height) for index in (start, start + target.numel() - 1))
        firsts.append(programs)
        programs += (last + 1 - first) * triton.cdiv(right.shape[2], width)
        written = [_address(source), _address(target), target.numel(), start, rounding or 0]
        columns.append([*written, _address(left), _address(right), rows, right.shape[2], terms, first])
    count = triton.next_power_of_2(len(jobs))
    product_kernel[(programs,)](_table(firsts, columns, device), count, *constants, height)


def _tile(index: int, rows: int, columns: int, height: int) -> int:
    """Which row of tiles a weight is in."""
    matrix, row = divmod(index // columns, rows)
    return matrix * triton.cdiv(rows, height) + row // height
