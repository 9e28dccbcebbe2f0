"""Compiled loops of the compatibility mode: rounding to a format, and sums of rounded changes."""

from __future__ import annotations

import numpy as np
from numba.core.extending import intrinsic

from deltaloom.merge._kernels import TILE, compiled

LEAST = np.float32(2.0**-14)
"""The smallest normal float16; below it numbers are multiples of 2**-24."""
STEPS = np.float32(0.75)
"""float32 numbers of this size are multiples of 2**-24, so adding and subtracting it rounds."""


@compiled
def coarsen(values, kind):
    """Round float32 values (n,) in place to nearest even: kind 1 to bfloat16, 2 to float16."""
    if kind == 1:
        bits = values.view(np.uint32)
        for i in range(bits.size):
            b = bits[i]
            near = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) & np.uint32(
                0xFFFF0000
            )
            number = (b & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000)
            bits[i] = near if number else np.uint32(0x7FC00000)
    elif kind == 2:
        for i in range(values.size):
            v = values[i]
            near = np.copysign((np.abs(v) + STEPS) - STEPS, v)
            values[i] = near if np.abs(v) < LEAST else v
        bits = values.view(np.uint32)
        for i in range(bits.size):
            b = bits[i]
            size = b & np.uint32(0x7FFFFFFF)
            near = (size + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))) & np.uint32(
                0xFFFFE000
            )
            near = near if near <= np.uint32(0x477FE000) else np.uint32(0x7F800000)
            near = near if size <= np.uint32(0x7F800000) else np.uint32(0x7FC00000)
            bits[i] = near | (b & np.uint32(0x80000000))


@intrinsic
def fused(typing, left, right, plus):
    """left * right + plus with one rounding."""

    def build(context, builder, signature, values):
        return builder.fma(*values)

    return plus(left, right, plus), build


@compiled
def add_weighted(models, weights, divisor, kind, out):
    """out (n,) = sum of weights (k,) * models (k, n) / divisor, first to last, each product added
    without rounding it, then rounded to the format.
    """
    one = out.dtype.type(1)
    for start in range(0, out.size, TILE):
        part = out[start : start + TILE]
        part[:] = out.dtype.type(0)
        for k in range(weights.size):
            row = models[k, start : start + TILE]
            w = weights[k]
            for i in range(part.size):
                part[i] = fused(row[i], w, part[i])  # pyright: ignore[reportCallIssue]
        if divisor != one:
            for i in range(part.size):
                part[i] = part[i] / divisor
        coarsen(part, kind)


@compiled
def differ(models, base, finer, kind):
    """models (k, n) become their changes over base (n,), each rounded; both are rounded first when
    inputs are `finer` than the format.
    """
    for start in range(0, base.size, TILE):
        origin = base[start : start + TILE]
        if finer:
            coarsen(origin, kind)
        for k in range(models.shape[0]):
            row = models[k, start : start + TILE]
            if finer:
                coarsen(row, kind)
            for i in range(origin.size):
                row[i] = row[i] - origin[i]
            coarsen(row, kind)


@compiled
def join(base, changes, weights, divisor, scale, consensus, normalize, kind, out):
    """out (n,) = base (n,) + scale * (sum of weights (k,) * changes (k, n)) / divisor, rounded
    after every step; changes are overwritten.

    With `consensus` the sum runs over the changes of the sign of the sum of all (0 counts as
    positive), and the divisor is the sum of their weights, 1 where that is 0.
    """
    zero = base.dtype.type(0)
    one = base.dtype.type(1)
    total = np.empty(TILE, base.dtype)
    share = np.empty(TILE, base.dtype)
    for start in range(0, out.size, TILE):
        part = out[start : start + TILE]
        n = part.size
        sums = total[:n]
        mass = share[:n]
        sums[:] = zero
        for k in range(weights.size):
            row = changes[k, start : start + TILE]
            w = weights[k]
            if w != one:
                for i in range(n):
                    row[i] = row[i] * w
                coarsen(row, kind)
            for i in range(n):
                sums[i] += row[i]
        coarsen(sums, kind)
        if consensus:
            part[:] = zero
            mass[:] = zero
            for k in range(weights.size):
                row = changes[k, start : start + TILE]
                w = weights[k]
                for i in range(n):
                    d = row[i]
                    agrees = d > zero if sums[i] >= zero else d < zero
                    part[i] += d if agrees | (d != d) else zero
                    mass[i] += w if agrees else zero
            coarsen(part, kind)
            if normalize:
                coarsen(mass, kind)
                for i in range(n):
                    part[i] = part[i] / (mass[i] if mass[i] != zero else one)
                coarsen(part, kind)
        else:
            part[:] = sums
            if normalize:
                for i in range(n):
                    part[i] = part[i] / divisor
                coarsen(part, kind)
        if scale != one:
            for i in range(n):
                part[i] = part[i] * scale
            coarsen(part, kind)
        row = base[start : start + TILE]
        for i in range(n):
            part[i] = row[i] + part[i]
        coarsen(part, kind)


@compiled
def keep_middle(values, low, drop, high, keep):
    """Zero, in place, what is outside the magnitudes low..high (float32 magnitude bits) of float32
    values (n,): of those at `low` the first `drop` go, of those at `high` only the first `keep`
    stay. Returns both counts for the next block of the same tensor.
    """
    bits = values.view(np.uint32)
    for i in range(bits.size):
        size = bits[i] & np.uint32(0x7FFFFFFF)
        stays = (size >= low) & (size <= high)
        if size == low and drop > 0:
            drop -= 1
            stays = False
        if size == high:
            if keep > 0:
                keep -= 1
            else:
                stays = False
        if not stays:
            bits[i] = np.uint32(0)
    return drop, keep
