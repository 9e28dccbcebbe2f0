"""The loops of plain merges, compiled by numba when `_native.py` asks for them.

They take addresses and keep a fixed order of operations per element, so that results do not depend
on how a tensor is cut into blocks.
"""

from __future__ import annotations

from numba import (
    carray,  # pyright: ignore[reportPrivateImportUsage]
    float32,
    float64,
    njit,
    types,
    uint32,
)

LANES = 16
"""Partial sums side by side."""
HIGH_BINS, LOW_BITS, LOW_BINS = 1 << 16, 15, 1 << 15
"""As `_order.py` has them."""
MAGNITUDE = uint32(0x7FFFFFFF)
TILE = 1024
"""Elements per inner loop: a few rows of this length stay in the first-level cache."""


@njit(inline="always")
def _narrow(bits, out):
    found = 0
    for i in range(out.size):
        x = bits[i]
        high = x >> uint32(16)
        # cut to 32 bits each time: numba would go on in 64
        near = uint32(uint32(x + uint32(0x7FFF)) + uint32(high & uint32(1))) >> uint32(16)
        # rounding up could turn a NaN into infinity
        is_nan = (x & uint32(0x7FFFFFFF)) > uint32(0x7F800000)
        out[i] = high | uint32(0x40) if is_nan else near
        found |= is_nan
    return found


@njit(inline="always")
def _widen(raw, bits):
    for i in range(raw.size):
        bits[i] = uint32(raw[i]) << uint32(16)


def narrow(values, raw, n):
    """raw (n,) uint16 = the bfloat16 nearest to values (n,), float32 as uint32; ties to even."""
    _narrow(carray(values, (n,)), carray(raw, (n,)))


def add_models(plus, base, models, changes, factors, common, added, k, n, out):
    """out (n,) = plus (n,) + common (1,) * sum_k factors (k,) (models (k, n) - base (n,)).

    Nothing is taken off the models that are `changes` (k,) already; `plus` is not `added` when that
    is 0. A factor of 1 is exact, so equal ones are best given as `common`.
    """
    start = carray(plus, (n,))
    origin = carray(base, (n,))
    rows = carray(models, (k, n))
    given = carray(changes, (k,))
    weights = carray(factors, (k,))
    by = carray(common, (1,))[0]
    total = carray(out, (n,))
    for begin in range(0, n, TILE):
        end = min(begin + TILE, n)
        part = total[begin:end]
        own = origin[begin:end]
        for j in range(k):
            row = rows[j, begin:end]
            w = weights[j]
            # one loop each, as a branch inside would keep it from being vectorised
            if j == 0 and given[j]:
                for i in range(part.size):
                    part[i] = w * row[i]
            elif j == 0:
                for i in range(part.size):
                    part[i] = w * (row[i] - own[i])
            elif given[j]:
                for i in range(part.size):
                    part[i] += w * row[i]
            else:
                for i in range(part.size):
                    part[i] += w * (row[i] - own[i])
        if added:
            first = start[begin:end]
            for i in range(part.size):
                part[i] = first[i] + by * part[i]
        else:
            for i in range(part.size):
                part[i] = by * part[i]


def add_bfloat16(base, models, factors, common, added, k, n, scratch, bits, nan, out):
    """`add_models` on bfloat16 as uint16, without changes; `plus` is the base or, when not `added`,
    nothing, and then nothing is taken off the models either.

    scratch (3 TILE,) float32, and the same memory as uint32 `bits`: no float leaves the cache.
    nan (1,) becomes 1 where a sum is not a number.
    """
    origin = carray(base, (n,))
    rows = carray(models, (k, n))
    weights = carray(factors, (k,))
    by = carray(common, (1,))[0]
    result = carray(out, (n,))
    floats = carray(scratch, (3, TILE))
    words = carray(bits, (3, TILE))
    for begin in range(0, n, TILE):
        end = min(begin + TILE, n)
        own, row, part = (
            floats[0, : end - begin],
            floats[1, : end - begin],
            floats[2, : end - begin],
        )
        if added:
            _widen(origin[begin:end], words[0])
        for j in range(k):
            _widen(rows[j, begin:end], words[1])
            w = weights[j]
            if j == 0 and added:
                for i in range(part.size):
                    part[i] = w * (row[i] - own[i])
            elif j == 0:
                for i in range(part.size):
                    part[i] = w * row[i]
            elif added:
                for i in range(part.size):
                    part[i] += w * (row[i] - own[i])
            else:
                for i in range(part.size):
                    part[i] += w * row[i]
        if added:
            for i in range(part.size):
                part[i] = own[i] + by * part[i]
        else:
            for i in range(part.size):
                part[i] = by * part[i]
        if _narrow(words[2], result[begin:end]):
            carray(nan, (1,))[0] = 1


def gram_bfloat16(models, start, k, n, scratch, bits, lanes):
    """Add to lanes (k (k + 1) / 2, LANES) float64 the inner products of models (k, n), bfloat16 as
    uint16, whose first element is the `start`-th of the tensor: pairs i <= j in order.

    Element e goes to lane e % LANES, so no cut into blocks shows. Products of two bfloat16 are
    exact in float32. scratch (k, TILE) float32, and the same memory as uint32 `bits`.
    """
    rows = carray(models, (k, n))
    floats = carray(scratch, (k, TILE))
    words = carray(bits, (k, TILE))
    sums = carray(lanes, (k * (k + 1) // 2, LANES))
    for begin in range(0, n, TILE):
        end = min(begin + TILE, n)
        size = end - begin
        for j in range(k):
            _widen(rows[j, begin:end], words[j])
        head = min(size, -(start + begin) % LANES)
        whole = head + (size - head) // LANES * LANES
        pair = 0
        for i in range(k):
            for j in range(i, k):
                a, b, own = floats[i], floats[j], sums[pair]
                for e in range(head):
                    own[(start + begin + e) % LANES] += float64(a[e] * b[e])
                for e in range(head, whole, LANES):
                    for lane in range(LANES):
                        own[lane] += float64(a[e + lane] * b[e + lane])
                for e in range(whole, size):
                    own[(start + begin + e) % LANES] += float64(a[e] * b[e])
                pair += 1


def combine_bfloat16(models, factors, k, n, scratch, bits, totals, nan, out):
    """out (n,) = sum_k factors (k,) float64 models (k, n), bfloat16 as uint16, summed in float64.

    A model at zero has no part. scratch (2, TILE) float32, the same memory as uint32 `bits`,
    totals (TILE,) float64; `nan` as in `add_bfloat16`.
    """
    rows = carray(models, (k, n))
    weights = carray(factors, (k,))
    result = carray(out, (n,))
    floats = carray(scratch, (2, TILE))
    words = carray(bits, (2, TILE))
    total = carray(totals, (TILE,))
    for begin in range(0, n, TILE):
        end = min(begin + TILE, n)
        row, narrowed = floats[0, : end - begin], floats[1, : end - begin]
        part = total[: end - begin]
        first = True
        for j in range(k):
            w = weights[j]
            if w != 0.0:
                _widen(rows[j, begin:end], words[0])
                if first:
                    for i in range(part.size):
                        part[i] = w * float64(row[i])
                else:
                    for i in range(part.size):
                        part[i] += w * float64(row[i])
                first = False
        if first:
            part[:] = 0.0
        for i in range(part.size):
            narrowed[i] = part[i]
        if _narrow(words[1], result[begin:end]):
            carray(nan, (1,))[0] = 1


@njit(inline="always")
def _change(base, model, floats, words):
    """The change of a tile, in the scratch's last row."""
    m = base.size
    _widen(base, words[0, :m])
    _widen(model, words[1, :m])
    own, row, change = floats[0, :m], floats[1, :m], floats[2, :m]
    for i in range(m):
        change[i] = row[i] - own[i]


def count_high_bfloat16(base, model, n, scratch, bits, counts):
    """Add to counts (65536,) the upper 16 of the 31 magnitude bits of the float32 changes of
    model (n,) over base (n,), bfloat16 as uint16.

    scratch (3, TILE) float32, and the same memory as uint32 `bits`.
    """
    origin, row, sums = carray(base, (n,)), carray(model, (n,)), carray(counts, (HIGH_BINS,))
    floats, words = carray(scratch, (3, TILE)), carray(bits, (3, TILE))
    for begin in range(0, n, TILE):
        end = min(begin + TILE, n)
        _change(origin[begin:end], row[begin:end], floats, words)
        change = words[2, : end - begin]
        for i in range(change.size):
            sums[(change[i] & MAGNITUDE) >> uint32(LOW_BITS)] += 1


def count_low_bfloat16(base, model, wanted, n, scratch, bits, counts):
    """The same of the lower 15 bits, counts (32768,), where the upper ones are `wanted`."""
    origin, row, sums = carray(base, (n,)), carray(model, (n,)), carray(counts, (LOW_BINS,))
    floats, words = carray(scratch, (3, TILE)), carray(bits, (3, TILE))
    high = uint32(wanted)
    for begin in range(0, n, TILE):
        end = min(begin + TILE, n)
        _change(origin[begin:end], row[begin:end], floats, words)
        for start in range(0, end - begin, 64):
            part = words[2, start : min(start + 64, end - begin)]
            found = 0
            for i in range(part.size):  # a look without branches first: most have no match
                found += ((part[i] & MAGNITUDE) >> uint32(LOW_BITS)) == high
            if found:
                for i in range(part.size):
                    if ((part[i] & MAGNITUDE) >> uint32(LOW_BITS)) == high:
                        sums[part[i] & uint32(LOW_BINS - 1)] += 1


@njit(inline="always")
def _trim(change, limit, equal):
    """As `trim` of `_kernels.py`."""
    here = 0
    if equal > 0:
        for i in range(change.size):
            here += (change[i] & MAGNITUDE) == limit
    if here > equal:
        for i in range(change.size):
            size = change[i] & MAGNITUDE
            if size == limit and equal > 0:
                equal -= 1
            elif size <= limit:
                change[i] = uint32(0)
        return 0
    least = limit if equal > 0 else limit + uint32(1)
    for i in range(change.size):
        change[i] = change[i] if (change[i] & MAGNITUDE) >= least else uint32(0)
    return equal - here


def elect_bfloat16(
    base, models, limits, equals, factors, scale, normalize, k, n, scratch, bits, nan, out
):
    """`elect` of `_kernels.py` on bfloat16 as uint16, of changes trimmed to the magnitudes (31
    bits) above limits (k,), and the first equals (k,) at them; equals becomes what is left.

    scratch (k + 6, TILE) float32, and the same memory as uint32 `bits`; scale (1,); `nan` as in
    `add_bfloat16`.
    """
    origin, rows, result = carray(base, (n,)), carray(models, (k, n)), carray(out, (n,))
    least, left, weights = carray(limits, (k,)), carray(equals, (k,)), carray(factors, (k,))
    by = carray(scale, (1,))[0]
    floats, words = carray(scratch, (k + 6, TILE)), carray(bits, (k + 6, TILE))
    zero = float32(0.0)
    for begin in range(0, n, TILE):
        m = min(TILE, n - begin)
        total, part, share = floats[3, :m], floats[4, :m], floats[5, :m]
        for j in range(k):
            _change(origin[begin : begin + m], rows[j, begin : begin + m], floats, words)
            left[j] = _trim(words[2, :m], uint32(least[j]), left[j])
            change, w, kept = floats[2, :m], weights[j], floats[6 + j, :m]
            if j == 0:
                for i in range(m):
                    total[i] = kept[i] = w * change[i]
            else:
                for i in range(m):
                    kept[i] = w * change[i]
                    total[i] += kept[i]
        part[:] = zero
        share[:] = zero
        for j in range(k):
            kept, w = floats[6 + j, :m], weights[j]
            for i in range(m):
                d = kept[i]
                agrees = d > zero if total[i] >= zero else d < zero
                part[i] += d if agrees | (d != d) else zero
                share[i] += w if agrees | (d != d) else zero
        own = floats[0, :m]
        for i in range(m):
            mass = share[i] if (normalize != 0) & (share[i] != zero) else float32(1.0)
            d = by * (part[i] / mass)
            part[i] = own[i] + d if d != zero else own[i]
        if _narrow(words[4, :m], result[begin : begin + m]):
            carray(nan, (1,))[0] = 1


def _sum_of(kind):
    at = types.CPointer(kind)
    flags = types.CPointer(types.uint8)
    return types.void(at, at, at, flags, at, at, types.int64, types.int64, types.int64, at)


_words, _floats = types.CPointer(types.uint16), types.CPointer(types.float32)
_long, _flags = types.CPointer(types.uint32), types.CPointer(types.uint8)
_doubles, _count = types.CPointer(types.float64), types.int64
_counts = types.CPointer(types.int64)
LOOPS = {
    "narrow": (narrow, types.void(_long, _words, _count)),
    "add_float32": (add_models, _sum_of(types.float32)),
    "add_float64": (add_models, _sum_of(types.float64)),
    "add_bfloat16": (
        add_bfloat16,
        types.void(
            *(_words, _words, _floats, _floats, _count, _count, _count),
            *(_floats, _long, _flags, _words),
        ),
    ),
    "gram_bfloat16": (
        gram_bfloat16,
        types.void(_words, _count, _count, _count, _floats, _long, _doubles),
    ),
    "combine_bfloat16": (
        combine_bfloat16,
        types.void(_words, _doubles, _count, _count, _floats, _long, _doubles, _flags, _words),
    ),
    "count_high_bfloat16": (
        count_high_bfloat16,
        types.void(_words, _words, _count, _floats, _long, _counts),
    ),
    "count_low_bfloat16": (
        count_low_bfloat16,
        types.void(_words, _words, _count, _count, _floats, _long, _counts),
    ),
    "elect_bfloat16": (
        elect_bfloat16,
        types.void(
            *(_words, _words, _counts, _counts, _floats, _floats, _count, _count, _count),
            *(_floats, _long, _flags, _words),
        ),
    ),
}
"""Name -> the loop and its signature."""
