"""The noise contract on CPU (Philox4x32-10 and Box-Muller), and sums of low-rank terms; vectorised by Numba and LLVM.

The loops run over 1024 lanes without a dependence between them, which is what makes them vectorise; the two stages
(words, normals) are separate loops so that the integer one can work in 64-bit lanes.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from transformers.utils import logging


logger = logging.get_logger(__name__)

LANES = 1024  # counters in a block
BLOCK = 4 * LANES  # normals in a block: counter i gives the normals i, i + 1024, i + 2048 and i + 3072

SCRATCH = 8 * BLOCK  # weights that stay in the cache until they are rounded

u16, u32, u64, i32, i64, f32 = np.uint16, np.uint32, np.uint64, np.int32, np.int64, np.float32

LOW = u64(0xFFFFFFFF)
WORD = u64(32)
MULTIPLIER_0, MULTIPLIER_1 = u64(0xD2511F53), u64(0xCD9E8D57)
WEYL_0, WEYL_1 = u64(0x9E3779B9), u64(0xBB67AE85)
MANTISSA = u32(0x007FFFFF)
SQRT_HALF = u32(0x3F3504F3)  # the bits of float32(sqrt(0.5))
SQRT_HALF_2_24 = u32(0x3F3504F3 + (24 << 23))  # and of sqrt(0.5) * 2**24
SIGN, INFINITY = u32(0x80000000), u32(0x7F800000)
SMALLEST_FLOAT16 = u32(0x38800000)  # the bits of float32(2**-14), the smallest normal one


def kernel(**options: Any) -> Callable[[Callable], Callable]:
    """Compile a function that is called from Python, and keep the machine code for later processes if that can be."""

    def compiled(function: Callable) -> Callable:
        dispatcher = njit(nogil=True, **options)(function)
        try:
            dispatcher.enable_caching()
        except RuntimeError as error:  # neither this package's folder nor the user's cache can be written to
            logger.warning_once(
                f"The noise kernels are compiled anew in each process, which takes some seconds: Numba says {error}. "
                "Set NUMBA_CACHE_DIR to a folder that can be written to."
            )
        return dispatcher

    return compiled


@njit(inline="always")
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al., 2011) on 64-bit lanes; only the low 32 bits of what it returns count."""
    for _ in range(10):
        p0 = (c0 & LOW) * MULTIPLIER_0
        p1 = (c2 & LOW) * MULTIPLIER_1
        c0 = (p1 >> WORD) ^ c1 ^ k0
        c1 = p1
        c2 = (p0 >> WORD) ^ c3 ^ k1
        c3 = p0
        k0 = k0 + WEYL_0
        k1 = k1 + WEYL_1
    return c0, c1, c2, c3


@njit(inline="always")
def pack(even, odd):
    return (even & LOW) | (odd << WORD)


@njit(nogil=True)
def block_words(block, stream, seed, words):
    """Write the 4 x 1024 Philox words of a block; two 32-bit words lie in each 64-bit element of `words`."""
    first = block * u64(LANES)
    high = first >> WORD
    s0, s1 = stream & LOW, stream >> WORD
    k0, k1 = seed & LOW, seed >> WORD
    for j in range(LANES // 2):
        even = first + u64(2 * j)
        a0, a1, a2, a3 = philox(even, high, s0, s1, k0, k1)
        b0, b1, b2, b3 = philox(even + u64(1), high, s0, s1, k0, k1)
        words[0, j] = pack(a0, b0)
        words[1, j] = pack(a1, b1)
        words[2, j] = pack(a2, b2)
        words[3, j] = pack(a3, b3)


@njit(inline="always", fastmath={"contract"})
def box_muller(w0, w1):
    """Two standard normals from two words.

    The radius is sqrt(-2 ln u) with u = (w0 // 256 + 1/2) / 2**24, rounded to float32. The angle lies in a quarter
    circle around the x axis (the low 30 bits of w1), and the other three quarters follow by exchanging the coordinates
    (bit 30) and the signs (bit 31). The polynomials are minimax fits with errors of about half a float32 ulp.
    """
    u = f32(i32(u32(w0 >> u32(8)))) + f32(0.5)
    bits = u32(f32(u).view(u32) - SQRT_HALF_2_24)
    exponent = f32(i32(i32(bits) >> i32(23)))
    m = u32(u32(bits & MANTISSA) + SQRT_HALF).view(f32) - f32(1)
    m2 = m * m
    y0 = f32(-0.6666942981228132) * m + f32(1.0000064687382242)
    y1 = f32(-0.39813766374512474) * m + f32(0.4994245698915348)
    y2 = f32(-0.32361001852293554) * m + f32(0.34486449893513514)
    y = ((f32(0.20164754509051388) * m2 + y2) * m2 + y1) * m2 + y0
    radius = f32(math.sqrt(exponent * f32(-2 * math.log(2)) + (y * m2 - (m + m))))
    radius = u32(f32(radius).view(u32) ^ u32(w1 & u32(0x80000000))).view(f32)

    x = f32(i32(u32(w1 << u32(2)))) * f32(math.pi / 2**33)
    x2 = x * x
    sin = ((f32(-1.9517283822e-4) * x2 + f32(8.332178038e-3)) * x2 + f32(-1.6666654942e-1)) * (x2 * x) + x
    cos = ((f32(-1.3597809512e-3) * x2 + f32(4.1656293613e-2)) * x2 + f32(-4.9999894767e-1)) * x2 + f32(1)
    exchange = i32(u32(w1 << u32(1))) < i32(0)
    a, b = radius * cos, radius * sin
    return (b if exchange else a), (a if exchange else b)


@njit(nogil=True, fastmath={"contract"})
def write_normals(words, c, s0, s1, s2, s3, t0, t1, t2, t3):
    """t = s + c * normals; the source must not overlap the target, or LLVM does not vectorise."""
    for i in range(LANES):
        z0, z1 = box_muller(words[0, i], words[1, i])
        z2, z3 = box_muller(words[2, i], words[3, i])
        t0[i] = s0[i] + c * z0
        t1[i] = s1[i] + c * z1
        t2[i] = s2[i] + c * z2
        t3[i] = s3[i] + c * z3


@njit(nogil=True, fastmath={"contract"})
def add_normals(words, c, t0, t1, t2, t3):
    for i in range(LANES):
        z0, z1 = box_muller(words[0, i], words[1, i])
        z2, z3 = box_muller(words[2, i], words[3, i])
        t0[i] += c * z0
        t1[i] += c * z1
        t2[i] += c * z2
        t3[i] += c * z3


@njit(nogil=True)
def copy(source, target):
    for i in range(target.shape[0]):
        target[i] = source[i]


@kernel()
def add(source, target, start, stream, seeds, coefficients):
    """target = source + sum_k coefficients[k] * noise(seeds[k], stream, start + i), float32, one read and one write.

    Args:
        source: float32 array like `target` (the same memory is allowed), or an empty one for zeros.
        target: float32 array.
        start: flat index of target[0] in the whole parameter.
        stream: uint64 hash of the parameter's name.
        seeds: uint64 array of shape (members,).
        coefficients: float32 array of shape (members,).
    """
    n = target.shape[0]
    in_place = source.shape[0] > 0 and source.ctypes.data == target.ctypes.data
    words = np.empty((4, LANES // 2), u64)
    words32 = words.view(u32)
    zeros = np.zeros(BLOCK, f32)
    edge = np.empty(BLOCK, f32)  # a block of which only a part lies in the target
    for block in range(start // BLOCK, (start + n + BLOCK - 1) // BLOCK):
        origin = block * BLOCK
        low, high = max(start, origin), min(start + n, origin + BLOCK)
        whole = high - low == BLOCK
        t = target[low - start : high - start] if whole else edge
        s = zeros
        accumulate = False
        if source.shape[0] > 0:
            if not whole:
                copy(source[low - start : high - start], edge[low - origin : high - origin])
                accumulate = True
            elif in_place:
                accumulate = True
            else:
                s = source[low - start : high - start]
        t0, t1, t2, t3 = t[:LANES], t[LANES : 2 * LANES], t[2 * LANES : 3 * LANES], t[3 * LANES :]
        for k in range(seeds.shape[0]):
            block_words(u64(block), stream, seeds[k], words)
            if accumulate:
                add_normals(words32, coefficients[k], t0, t1, t2, t3)
            else:
                s0, s1, s2, s3 = s[:LANES], s[LANES : 2 * LANES], s[2 * LANES : 3 * LANES], s[3 * LANES :]
                write_normals(words32, coefficients[k], s0, s1, s2, s3, t0, t1, t2, t3)
                accumulate = True
        if not whole:
            copy(edge[low - origin : high - origin], target[low - start : high - start])


@njit(nogil=True)
def round_to_bfloat16(values, target):
    """Round float32 bits to the nearest bfloat16 bits, ties to even, as torch does."""
    for i in range(target.shape[0]):
        bits = values[i]
        target[i] = u16(u32(bits + u32(0x7FFF) + u32(u32(bits >> u32(16)) & u32(1))) >> u32(16))


@njit(inline="always")
def rounding_bits(index, key):
    """32 random bits for the rounding of a weight: a hash (lowbias32 of Wellons) of its index, modulo 2**32."""
    x = u32(index ^ u32(key & LOW))
    x = u32(u32(x ^ u32(x >> u32(16))) * u32(0x7FEB352D))
    x = u32(x + u32(key >> WORD))
    x = u32(u32(x ^ u32(x >> u32(15))) * u32(0x846CA68B))
    return u32(x ^ u32(x >> u32(16)))


@kernel()
def dither_bfloat16(values, start, key):
    """Round float32 values to bfloat16 values, up or down at random, so that the mean is the value itself.

    Random bits are added below the last bit that stays: the carry rounds up.

    Args:
        values: uint32 array of the values' bits, which is changed.
        start: flat index of values[0] in the whole parameter.
        key: uint64 key of the rounding.
    """
    first = u32(start & i64(0xFFFFFFFF))
    for i in range(values.shape[0]):
        bits = values[i]
        random = rounding_bits(u32(first + u32(i)), key) & u32(0xFFFF)
        rounded = u32(u32(bits + random) & u32(0xFFFF0000))
        values[i] = rounded if (bits & INFINITY) != INFINITY else bits


@kernel()
def dither_float16(values, start, key):
    """The same for float16, which has steps of one size, 2**-24, below 2**-14."""
    floats = values.view(f32)
    first = u32(start & i64(0xFFFFFFFF))
    for i in range(values.shape[0]):
        bits = values[i]
        random = rounding_bits(u32(first + u32(i)), key)
        rounded = u32(u32(bits + (random & u32(0x1FFF))) & u32(0xFFFFE000))
        steps = f32(abs(floats[i]) * f32(2**24) + f32(i32(u32(random >> u32(8)))) * f32(2**-24))
        small = u32(f32(f32(i32(min(steps, f32(2048)))) * f32(2**-24)).view(u32) | u32(bits & SIGN))
        rounded = small if (bits & ~SIGN) < SMALLEST_FLOAT16 else rounded
        values[i] = rounded if (bits & INFINITY) != INFINITY else bits


@kernel()
def add_bfloat16(source, target, start, stream, seeds, coefficients, stochastic, key):
    """The same as `add`, rounded to bfloat16: `target` is a uint16 array of its bits, which is written once."""
    n = target.shape[0]
    scratch = np.empty(SCRATCH, f32)
    bits = scratch.view(u32)
    for origin in range(start // SCRATCH * SCRATCH, start + n, SCRATCH):
        low, high = max(start, origin) - start, min(start + n, origin + SCRATCH) - start
        piece = source[low:high] if source.shape[0] > 0 else source
        add(piece, scratch[: high - low], start + low, stream, seeds, coefficients)
        if stochastic:
            dither_bfloat16(bits[: high - low], start + low, key)
        round_to_bfloat16(bits[: high - low], target[low:high])


@kernel()
def fill_each(target, stream, seeds):
    """target[k] = noise(seeds[k], stream), for a float32 array of shape (seeds, n)."""
    nothing = np.empty(0, f32)
    one = np.ones(1, f32)
    for k in range(seeds.shape[0]):
        add(nothing, target[k], 0, stream, seeds[k : k + 1], one)


@kernel(fastmath={"contract"})
def add_product(source, target, start, left, right):
    """target = source + left @ right at flat indices from `start` on, float32.

    A value is one chain of fused multiply-adds over the terms, whatever slice is asked for: libraries add up in an
    order that hangs on the shape and the number of threads.

    Args:
        source: float32 array like `target` (the same memory is allowed), or an empty one for zeros.
        target: float32 array.
        start: flat index of target[0] in the whole parameter.
        left: float32 array of shape (matrices * rows, terms).
        right: float32 array of shape (matrices, terms, columns).
    """
    matrices, terms, columns = right.shape
    rows = left.shape[0] // matrices
    done = 0
    while done < target.shape[0]:
        row = (start + done) // columns
        first = start + done - row * columns
        width = min(columns - first, target.shape[0] - done)
        t = target[done : done + width]
        if source.shape[0] == 0:
            t[:] = f32(0)
        elif source.ctypes.data != target.ctypes.data:
            copy(source[done : done + width], t)
        add_row(t, left[row], right[row // rows], first)
        done += width


@njit(nogil=True, fastmath={"contract"})
def add_row(t, a, r, first):
    last = first + t.shape[0]
    whole = a.shape[0] // 4 * 4
    for k in range(0, whole, 4):
        add_4(t, a[k : k + 4], r[k, first:last], r[k + 1, first:last], r[k + 2, first:last], r[k + 3, first:last])
    for k in range(whole, a.shape[0]):
        add_1(t, a[k], r[k, first:last])


@njit(nogil=True, fastmath={"contract"})
def add_4(t, a, r0, r1, r2, r3):
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    for j in range(t.shape[0]):
        t[j] = t[j] + a0 * r0[j] + a1 * r1[j] + a2 * r2[j] + a3 * r3[j]


@njit(nogil=True, fastmath={"contract"})
def add_1(t, a, r):
    for j in range(t.shape[0]):
        t[j] = t[j] + a * r[j]
