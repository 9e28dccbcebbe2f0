"""Compiled loops of submodular maximisation: gains, the lazy heap, the nearest neighbours.

A kernel is flat here: candidate j's similarities are `values[starts[j]:ends[j]]`, for the points
`columns[starts[j]:ends[j]]`, or for all points in order when `columns` is empty (dense). Every loop
releases the GIL and is cached on disk.

A gain is summed in float64 and rounded to float32, so that the order of summation, which differs
between forms of a kernel, seldom decides between candidates. Every step (differences, sums in a
fixed order, rounding) is monotone, so an old gain is an upper bound of the new one exactly, not up
to rounding: the lazy forms pick what the plain one picks. (Where a dense kernel goes over to a
sparse one, sums change their order once, so gains that differ by less than 1e-7 may swap.)

A sparse row that is evaluated loses the entries that are no larger than what their points have:
that only grows, so they never count again.
"""

from __future__ import annotations

import numba
import numpy as np


def compiled(function):
    """`function` compiled by numba without the GIL, cached next to the source."""
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)


def compiled_in_lanes(function):
    """As `compiled`, for sums over rows without NaN that may be made in any fixed order."""
    flags = {"reassoc", "nnan", "nsz"}
    return numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=flags)(function)


@compiled_in_lanes
def row_gain(row, low, cap):
    """sum_i max(min(row_i, cap_i) - low_i, 0) of one dense row (m,)."""
    total = 0.0
    for i in range(row.size):
        value = min(row[i], cap[i]) - low[i]
        total += max(value, np.float32(0))
    return np.float32(total)


@compiled
def row_gains(rows, low, cap, out):
    """`row_gain` of every row of (b, m)."""
    for b in range(rows.shape[0]):
        out[b] = row_gain(rows[b], low, cap)


@compiled
def gain(values, columns, starts, ends, j, low, cap):
    """`row_gain` of candidate j of a flat kernel; shortens its row if it is sparse."""
    start = starts[j]
    if columns.size == 0:
        return row_gain(values[start : ends[j]], low, cap)
    total = 0.0
    kept = start
    for k in range(start, ends[j]):
        i = columns[k]
        value = values[k]
        difference = min(value, cap[i]) - low[i]
        total += max(difference, np.float32(0))
        values[kept] = value  # written first, counted then: no branch to guess wrong
        columns[kept] = i
        kept += difference > 0
    ends[j] = kept
    return np.float32(total)


@compiled
def raise_row(row, low, cap):
    """low = max(low, min(row, cap)) for a dense row (m,)."""
    for i in range(row.size):
        low[i] = max(low[i], min(row[i], cap[i]))


@compiled
def raise_low(values, columns, starts, ends, j, low, cap):
    """low = max(low, min(row, cap)): candidate j has been chosen."""
    if columns.size == 0:
        raise_row(values[starts[j] : ends[j]], low, cap)
        return
    for k in range(starts[j], ends[j]):
        i = columns[k]
        low[i] = max(low[i], min(values[k], cap[i]))


@compiled
def all_gains(values, columns, starts, ends, low, cap, out):
    """Gains (n,) of every candidate."""
    for j in range(out.size):
        out[j] = gain(values, columns, starts, ends, j, low, cap)


@compiled_in_lanes
def useful(rows, low, cap):
    """How many entries of (b, m) are larger than what their points have."""
    count = 0
    for b in range(rows.shape[0]):
        row = rows[b]
        for i in range(row.size):
            count += min(row[i], cap[i]) > low[i]
    return count


@compiled
def keep_useful(rows, low, cap, values, columns, filled, ends):
    """Append the entries that `useful` counts to values and columns, which hold `filled` so far.

    ends (b,) tells where each row's end. Stops before a row that might not fit; returns how many
    rows were done and how many entries there are.
    """
    for b in range(rows.shape[0]):
        row = rows[b]
        if filled + row.size > values.size:
            return b, filled
        for i in range(row.size):  # written first, counted then: no branch to guess wrong
            values[filled] = row[i]
            columns[filled] = i
            filled += min(row[i], cap[i]) > low[i]
        ends[b] = filled
    return rows.shape[0], filled


@compiled
def sift(heap, size, at, bounds):
    """Let the candidate at place `at` sink until none below has a larger bound (or its index)."""
    j = heap[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        a = heap[child]
        if child + 1 < size:
            b = heap[child + 1]
            if bounds[b] > bounds[a] or (bounds[b] == bounds[a] and b < a):
                child += 1
                a = b
        if bounds[a] > bounds[j] or (bounds[a] == bounds[j] and a < j):
            heap[at] = a
            at = child
        else:
            break
    heap[at] = j


@compiled
def lazy(values, columns, starts, ends, low, cap, bounds, heap, picks, gains, most):
    """Fill picks (k,) and gains (k,) by lazy greedy from the candidates `heap`, in any order.

    Minoux 1978: the candidate with the largest old gain is evaluated again until it stays on top.
    `bounds` (n,) holds gains of now or before. Ends early after the pick that made it `most`
    evaluations. Returns the numbers of picks and of evaluations.
    """
    size = heap.size
    for at in range(size // 2, -1, -1):
        if size:
            sift(heap, size, at, bounds)
    computed = np.full(bounds.size, -1)  # the round of each bound
    evaluations = 0
    for t in range(picks.size):
        while True:
            j = heap[0]
            if computed[j] == t or bounds[j] <= 0:
                break
            bounds[j] = gain(values, columns, starts, ends, j, low, cap)
            computed[j] = t
            evaluations += 1
            sift(heap, size, 0, bounds)
        picks[t] = j
        gains[t] = bounds[j]
        raise_low(values, columns, starts, ends, j, low, cap)
        size -= 1
        heap[0] = heap[size]
        sift(heap, size, 0, bounds)
        if evaluations >= most:
            return t + 1, evaluations
    return picks.size, evaluations


@compiled
def best_of(values, columns, starts, ends, low, cap, bounds, order):
    """The best candidate among `order` (r,), which is sorted by bound, then by index.

    Returns it and the number of evaluations; the bounds of those evaluated become their gains.
    """
    best = -1
    evaluations = 0
    for j in order:
        if best >= 0 and (bounds[j] < bounds[best] or (bounds[j] == bounds[best] and j > best)):
            break
        bounds[j] = gain(values, columns, starts, ends, j, low, cap)
        evaluations += 1
        if best < 0 or bounds[j] > bounds[best] or (bounds[j] == bounds[best] and j < best):
            best = j
    return best, evaluations


@compiled
def front(bounds, computed, t, members, best, out):
    """Up to `out.size` members with the largest bounds that round t has yet to evaluate.

    `members` ascend; those that cannot beat `best` (-1 for none) are left out. Returns how many
    were found, largest first, of equals the first.
    """
    found = 0
    for j in members:
        bound = bounds[j]
        if computed[j] == t:
            continue
        if best >= 0 and (bound < bounds[best] or (bound == bounds[best] and j > best)):
            continue
        if found == out.size and bound <= bounds[out[found - 1]]:
            continue
        at = found if found < out.size else found - 1
        while at > 0 and bounds[out[at - 1]] < bound:
            out[at] = out[at - 1]
            at -= 1
        out[at] = j
        if found < out.size:
            found += 1
    return found


@compiled
def largest(rows, places, values):
    """The k largest of each row of (b, n): places (b, k), values (b, k), largest first.

    Of equals the first; k is at most n.
    """
    k = places.shape[1]
    for b in range(rows.shape[0]):
        row, place, value = rows[b], places[b], values[b]
        found = 0
        least = np.float32(0)
        for j in range(row.size):
            v = row[j]
            if found == k and v <= least:
                continue
            at = found if found < k else k - 1
            while at > 0 and value[at - 1] < v:
                value[at] = value[at - 1]
                place[at] = place[at - 1]
                at -= 1
            value[at] = v
            place[at] = j
            if found < k:
                found += 1
            least = value[found - 1]


@compiled
def fold(rows, total):
    """total (n,) float64 += the rows of (b, n), negative entries counted as zero."""
    for b in range(rows.shape[0]):
        row = rows[b]
        for i in range(row.size):
            total[i] += max(row[i], np.float32(0))
