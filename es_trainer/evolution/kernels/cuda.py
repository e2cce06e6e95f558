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
def store(target, index, size, values):
    tl.store(target + index, values.to(target.dtype.element_ty), mask=(index >= 0) & (index < size))


@triton.jit
def add_kernel(source, target, size, start, keys, coefficients, members):
    # 64 bits: a parameter may have more than 2**31 elements
    block = start // BLOCK + tl.program_id(0).to(tl.int64)
    counter = block * LANES + tl.arange(0, LANES)
    stream = tl.load(keys)  # the seeds follow it
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = stream.to(tl.uint32), (stream >> 32).to(tl.uint32)

    i0 = block * BLOCK - start + tl.arange(0, LANES)
    i1, i2, i3 = i0 + LANES, i0 + 2 * LANES, i0 + 3 * LANES
    t0, t1, t2, t3 = load(source, i0, size), load(source, i1, size), load(source, i2, size), load(source, i3, size)
    for k in range(members):
        w0, w1, w2, w3 = tl.philox(tl.load(keys + 1 + k), c0, c1, c2, c3, 10)
        c = tl.load(coefficients + k)
        z0, z1 = box_muller(w0, w1)
        z2, z3 = box_muller(w2, w3)
        t0 += c * z0
        t1 += c * z1
        t2 += c * z2
        t3 += c * z3
    store(target, i0, size, t0)
    store(target, i1, size, t1)
    store(target, i2, size, t2)
    store(target, i3, size, t3)


def add(
    source: torch.Tensor | None,
    target: torch.Tensor,
    start: int,
    stream: int,
    seeds: Sequence[int],
    coefficients: Sequence[float],
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
    """
    # Without `non_blocking` each call would wait for all work that the device has been given
    keys = torch.tensor([stream, *seeds], dtype=torch.uint64).to(target.device, non_blocking=True)
    factors = torch.tensor(coefficients, dtype=torch.float32).to(target.device, non_blocking=True)
    size = target.numel()
    blocks = triton.cdiv(start + size, BLOCK.value) - start // BLOCK.value
    # Triton launches on the current device, which need not be the target's
    with torch.cuda.device_of(target):
        # Fused multiply-adds round differently, and whether they are the default depends on Triton's version
        add_kernel[(blocks,)](source, target, size, start, keys, factors, len(seeds), enable_fp_fusion=True)
