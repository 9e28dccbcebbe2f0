"""Compiled loops of the merge room: exact selection, counter-based draws, votes, low-rank products.

Every loop releases the GIL, keeps a fixed order of operations per element (so results do not depend
on how a tensor is cut into blocks) and is compiled at its first call, then cached on disk. Starting
the compiler costs half a second, so this module is imported by those who need it when they do:
plain weighted sums run on numpy alone.
"""

from __future__ import annotations

import numba
import numpy as np

from deltaloom.merge._order import LOW_BINS, LOW_BITS

TILE = 4096
"""Elements per inner loop: a few float32 rows of this length stay in the first-level cache."""


def compiled(function):
    """`function` compiled by numba without the GIL, cached next to the source."""
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)


@compiled
def weighted_sum(values, weights, start, stop, out):
    """out (m,) = sum_k weights (k,) values (k, start:stop), in the order of k; m = stop - start."""
    # rows are cut to slices so that the loops run from zero: only then are they vectorised
    row = values[0, start:stop]
    w = weights[0]
    for i in range(out.size):
        out[i] = w * row[i]
    for k in range(1, weights.size):
        row = values[k, start:stop]
        w = weights[k]
        for i in range(out.size):
            out[i] += w * row[i]


@compiled
def add_combined(base, deltas, weights, out):
    """out (n,) = base (n,) + sum_k weights (k,) deltas (k, n); a zero sum keeps base's bits."""
    zero = base.dtype.type(0)
    for start in range(0, out.size, TILE):
        stop = min(start + TILE, out.size)
        part = out[start:stop]
        weighted_sum(deltas, weights, start, stop, part)
        row = base[start:stop]
        for i in range(part.size):
            part[i] = row[i] + part[i] if part[i] != zero else row[i]


@compiled
def elect(base, deltas, weights, scale, normalize, out):
    """Sign consensus: out (n,) = base (n,) + scale * sum of the weighted deltas that agree in sign.

    The elected sign is that of the weighted sum (a zero sum counts as positive); with `normalize`
    the sum is divided by the weights that took part. deltas (k, n). A NaN counts as agreeing, so
    that it reaches the output rather than vanishes.
    """
    zero = base.dtype.type(0)
    one = base.dtype.type(1)
    total = np.empty(TILE, base.dtype)
    share = np.empty(TILE, base.dtype)
    for start in range(0, out.size, TILE):
        stop = min(start + TILE, out.size)
        part = out[start:stop]
        weighted_sum(deltas, weights, start, stop, total[: stop - start])
        for i in range(part.size):
            part[i] = zero
            share[i] = zero
        for k in range(weights.size):
            row = deltas[k, start:stop]
            w = weights[k]
            for i in range(part.size):
                d = w * row[i]
                agrees = d > zero if total[i] >= zero else d < zero
                part[i] += d if agrees | (d != d) else zero
                share[i] += w if agrees | (d != d) else zero
        row = base[start:stop]
        for i in range(part.size):
            by = share[i] if normalize & (share[i] != zero) else one
            d = scale * (part[i] / by)
            part[i] = row[i] + d if d != zero else row[i]


@compiled
def count_high(bits, counts):
    """Add the upper 16 of 31 magnitude bits of the float32 `bits` (n,) to counts (65536,)."""
    for i in range(bits.size):
        counts[(bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(LOW_BITS)] += 1


@compiled
def count_low(bits, high, counts):
    """Add the lower 15 magnitude bits to counts (32768,) where the upper 16 equal `high`."""
    wanted = np.uint32(high)
    mask = np.uint32(LOW_BINS - 1)
    for start in range(0, bits.size, 64):
        part = bits[start : start + 64]
        found = 0
        for i in range(part.size):  # a branch-free look first: most groups have no match
            found += ((part[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(LOW_BITS)) == wanted
        if found:
            for i in range(part.size):
                if ((part[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(LOW_BITS)) == wanted:
                    counts[part[i] & mask] += 1


@compiled
def trim(bits, threshold, equal):
    """Zero, in place, the float32 `bits` (n,) uint32 whose magnitude bits are below `threshold`.

    The first `equal` elements at the threshold stay, later ones go; returns how many may still
    stay, for the next block of the same tensor.
    """
    limit = np.uint32(threshold)
    mask = np.uint32(0x7FFFFFFF)
    here = 0
    if equal > 0:
        for i in range(bits.size):
            here += (bits[i] & mask) == limit
    if here > equal:
        for i in range(bits.size):
            magnitude = bits[i] & mask
            if magnitude == limit and equal > 0:
                equal -= 1
            elif magnitude <= limit:
                bits[i] = np.uint32(0)
        return 0
    if equal > 0:
        for i in range(bits.size):
            bits[i] = bits[i] if (bits[i] & mask) >= limit else np.uint32(0)
    else:
        for i in range(bits.size):
            bits[i] = bits[i] if (bits[i] & mask) > limit else np.uint32(0)
    return equal - here


@compiled
def behead(bits, threshold, equal):
    """Zero, in place, the float32 `bits` (n,) uint32 whose magnitude bits are above `threshold`.

    The first `equal` elements at the threshold go too; returns how many are still to go, in the
    next block of the same tensor. A NaN stays, so that it reaches the output.
    """
    limit = np.uint32(threshold)
    infinite = np.uint32(0x7F800000)
    for i in range(bits.size):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        if magnitude == limit and equal > 0:
            equal -= 1
            bits[i] = np.uint32(0)
        elif magnitude > limit and magnitude <= infinite:
            bits[i] = np.uint32(0)
    return equal


GROUP = 64
"""Philox blocks drawn together: a group gives 4 * 64 consecutive elements."""


@compiled
def draw(group, key0, key1, words):
    """Fill words (4, 64) uint64 with Philox4x32-10 of the counters 64 * group + 0..63.

    The counter is (low word, high word, 0, 0), the key (key0, key1); every draw is below 2**32.
    Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), section 4.3.
    """
    low = np.uint64(0xFFFFFFFF)
    k0 = np.uint64(key0)
    k1 = np.uint64(key1)
    a, b, c, d = words[0], words[1], words[2], words[3]
    for j in range(GROUP):
        counter = np.uint64(group) * np.uint64(GROUP) + np.uint64(j)
        a[j] = counter & low
        b[j] = counter >> np.uint64(32)
        c[j] = np.uint64(0)
        d[j] = np.uint64(0)
    for _ in range(10):
        for j in range(GROUP):
            left = np.uint64(0xD2511F53) * (a[j] & low)
            right = np.uint64(0xCD9E8D57) * (c[j] & low)
            a[j] = (right >> np.uint64(32)) ^ b[j] ^ k0
            b[j] = right & low
            c[j] = (left >> np.uint64(32)) ^ d[j] ^ k1
            d[j] = left & low
        k0 = (k0 + np.uint64(0x9E3779B9)) & low
        k1 = (k1 + np.uint64(0xBB67AE85)) & low


@compiled
def drop(values, start, key0, key1, limit, scale):
    """values (n,) *= scale where the draw of flat element start + i is below `limit`, else 0.

    Element e takes word (e % 256) // 64 of block 64 * (e // 256) + e % 64: a fixed place in the
    stream, so blocks may be cut anywhere. limit (uint64) is out of 2**32.
    """
    zero = values.dtype.type(0)
    words = np.empty((4, GROUP), np.uint64)
    flat = words.reshape(4 * GROUP)
    done = 0
    while done < values.size:
        group, skip = divmod(start + done, 4 * GROUP)
        draw(group, key0, key1, words)
        part = values[done : done + min(4 * GROUP - skip, values.size - done)]
        draws = flat[skip : skip + part.size]
        for i in range(part.size):
            part[i] = part[i] * scale if draws[i] < limit else zero
        done += part.size


@compiled
def drop_each(values, chances, rescale, start, key0, key1):
    """values (n,) stay with their own chances (n,) float64, else 0; draws as in `drop`.

    With `rescale` what stays is divided by its chance.
    """
    zero = values.dtype.type(0)
    words = np.empty((4, GROUP), np.uint64)
    flat = words.reshape(4 * GROUP)
    done = 0
    while done < values.size:
        group, skip = divmod(start + done, 4 * GROUP)
        draw(group, key0, key1, words)
        part = values[done : done + min(4 * GROUP - skip, values.size - done)]
        own = chances[done : done + part.size]
        draws = flat[skip : skip + part.size]
        for i in range(part.size):
            by = own[i] if rescale else 1.0
            stays = draws[i] < np.uint64(own[i] * 4294967296.0)
            part[i] = values.dtype.type(part[i] / by) if stays else zero
        done += part.size


@compiled
def add_product(left, right, start, scale, out):
    """out (n,) += scale * (left (rows, r) @ right (r, columns)) at flat elements start + i.

    Sums over r first to last for every element, whatever the cut.
    """
    columns = right.shape[1]
    buffer = np.empty(min(columns, TILE), out.dtype)
    done = 0
    while done < out.size:
        y, x = divmod(start + done, columns)
        m = min(columns - x, out.size - done, buffer.size)
        row = buffer[:m]
        row[:] = 0
        for r in range(left.shape[1]):
            w = left[y, r]
            factor = right[r, x : x + m]
            for j in range(m):
                row[j] += w * factor[j]
        part = out[done : done + m]
        for j in range(m):
            part[j] += scale * row[j]
        done += m
