"""The noise contract on CUDA: Philox4x32-10 and Box-Muller in Triton, one program for each block of 4096 weights.

The values are those of the CPU kernel up to the rounding of float32: the same words, the same polynomials.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl


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
def load(source, index, size):
    if source is None:
        return tl.zeros(index.shape, tl.float32)
    else:  # without it, this would be compiled for `None`, too
        return tl.load(source + index, mask=(index >= 0) & (index < size)).to(tl.float32)


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
def store(target, index, size, values, start, key, stochastic: tl.constexpr):
    if stochastic:
        values = dither(values, start + index, key, target.dtype.element_ty == tl.float16)
    tl.store(target + index, values.to(target.dtype.element_ty), mask=(index >= 0) & (index < size))


@triton.jit
def add_kernel(source, target, size, start, keys, coefficients, members, stochastic: tl.constexpr):
    # 64 bits: a parameter may have more than 2**31 elements
    block = start // BLOCK + tl.program_id(0).to(tl.int64)
    counter = block * LANES + tl.arange(0, LANES)
    stream, key = tl.load(keys), tl.load(keys + 1)  # the seeds follow them
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = stream.to(tl.uint32), (stream >> 32).to(tl.uint32)

    i0 = block * BLOCK - start + tl.arange(0, LANES)
    i1, i2, i3 = i0 + LANES, i0 + 2 * LANES, i0 + 3 * LANES
    t0, t1, t2, t3 = load(source, i0, size), load(source, i1, size), load(source, i2, size), load(source, i3, size)
    for k in range(members):
        w0, w1, w2, w3 = tl.philox(tl.load(keys + 2 + k), c0, c1, c2, c3, 10)
        c = tl.load(coefficients + k)
        z0, z1 = box_muller(w0, w1)
        z2, z3 = box_muller(w2, w3)
        t0 += c * z0
        t1 += c * z1
        t2 += c * z2
        t3 += c * z3
    store(target, i0, size, t0, start, key, stochastic)
    store(target, i1, size, t1, start, key, stochastic)
    store(target, i2, size, t2, start, key, stochastic)
    store(target, i3, size, t3, start, key, stochastic)


def add(
    source: torch.Tensor | None,
    target: torch.Tensor,
    start: int,
    stream: int,
    seeds: Sequence[int],
    coefficients: Sequence[float],
    rounding: int | None = None,
) -> None:
    """
    Write `target = source + sum_k coefficients[k] * noise(seeds[k])` with one read and one write of the weights.

    Args:
        source (`torch.Tensor` or `None`):
            Flat tensor of the target's shape and device, or `None` for zeros. May be the target itself.
        target (`torch.Tensor`):
            Flat float32, bfloat16 or float16 tensor. The sum is computed in float32 and rounded once.
        start (`int`):
            Flat index of the target's first element in the whole parameter.
        stream (`int`):
            64-bit hash of the parameter's name.
        seeds (`Sequence[int]`):
            Seeds in `[0, 2**63)`.
        coefficients (`Sequence[float]`):
            One number for each seed; rounded to float32.
        rounding (`int`, *optional*):
            Key of a stochastic rounding to bfloat16 or float16. `None` rounds to nearest.
    """
    keys = _to_device([stream, rounding or 0, *seeds], torch.uint64, target.device)
    factors = _to_device(coefficients, torch.float32, target.device)
    size = target.numel()
    blocks = triton.cdiv(start + size, BLOCK.value) - start // BLOCK.value
    # Triton launches on the current device, which need not be the target's
    with torch.cuda.device_of(target):
        # Fused multiply-adds round differently, and whether they are the default depends on Triton's version
        add_kernel[(blocks,)](
            source, target, size, start, keys, factors, len(seeds), _dithers(target, rounding), enable_fp_fusion=True
        )


def _to_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Without `non_blocking` each call would wait for all work that the device has been given
    return torch.tensor(numbers, dtype=dtype, device="cpu").to(device, non_blocking=True)


def _dithers(target: torch.Tensor, rounding: int | None) -> bool:
    return rounding is not None and target.dtype in (torch.bfloat16, torch.float16)


TILE = 4096  # values of a product that a program computes


@triton.jit
def product_kernel(
    source,
    target,
    size,
    start,
    left,
    right,
    rows,
    columns,
    terms,
    first,
    keys,
    stochastic: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
):
    # Tiles are numbered from the parameter's first row on, and none lies in two matrices
    tile = first + tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, height)
    matrix = tile // tiles
    row = (tile - matrix * tiles) * height + tl.arange(0, height)
    column = tl.program_id(1).to(tl.int64) * width + tl.arange(0, width)
    in_rows, in_columns = row < rows, column < columns
    row = matrix * rows + row
    index = row[:, None] * columns + column[None, :] - start
    index = tl.where(in_rows[:, None] & in_columns[None, :], index, -1)
    a = left + row * terms
    b = right + matrix * terms * columns + column
    total = load(source, index, size)
    for k in range(terms):
        # One chain of fused multiply-adds for each value
        total = tl.fma(
            tl.broadcast_to(tl.load(a + k, mask=in_rows, other=0.0)[:, None], (height, width)),
            tl.broadcast_to(tl.load(b, mask=in_columns, other=0.0)[None, :], (height, width)),
            total,
        )
        b += columns
    store(target, index, size, total, start, tl.load(keys), stochastic)


def add_product(
    source: torch.Tensor | None,
    target: torch.Tensor,
    start: int,
    left: torch.Tensor,
    right: torch.Tensor,
    rounding: int | None = None,
) -> None:
    """
    Write `target = source + left @ right` at flat indices from `start` on.

    A value is one chain of fused multiply-adds over the terms, in their order, as on CPU: those of cuBLAS hang on the
    shape, and on whether TF32 is allowed.

    Args:
        source (`torch.Tensor` or `None`):
            Flat tensor of the target's shape and device, or `None` for zeros. May be the target itself.
        target (`torch.Tensor`):
            Flat float32, bfloat16 or float16 tensor. The sum is computed in float32 and rounded once.
        start (`int`):
            Flat index of the target's first element in the whole parameter.
        left (`torch.Tensor` of shape `(matrices, rows, terms)`):
            Contiguous float32 tensor.
        right (`torch.Tensor` of shape `(matrices, terms, columns)`):
            Contiguous float32 tensor.
        rounding (`int`, *optional*):
            Key of a stochastic rounding; see `add`.
    """
    _, rows, terms = left.shape
    columns, size = right.shape[2], target.numel()
    width = min(128, triton.next_power_of_2(columns))
    height = TILE // width

    def tile(index: int) -> int:
        matrix, row = divmod(index // columns, rows)
        return matrix * triton.cdiv(rows, height) + row // height

    first, last = tile(start), tile(start + size - 1)
    grid = (last + 1 - first, triton.cdiv(columns, width))
    keys = _to_device([rounding or 0], torch.uint64, target.device)
    with torch.cuda.device_of(target):
        product_kernel[grid](
            *(source, target, size, start, left, right, rows, columns, terms, first, keys),
            *(_dithers(target, rounding), height, width),
        )
