"""Compiled loops of the sparse product: what a changed element adds, and what it is to blame for.

Tokens go by blocks of `BLOCK`, packed with the tokens last: an element then is one multiply-add of
two short rows that lie in the cache, in vector instructions. No dense matrix is ever formed, so the
work is that of the elements. Reductions may be reordered by the compiler, never between calls.
"""

from __future__ import annotations

import numba
import numpy as np

BLOCK = 64
"""Tokens a block: four vector registers of float32, and (in + out) * 256 bytes of scratch."""
REORDERED = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function):
    """`function` compiled by numba without the GIL, cached next to the source."""
    return numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=REORDERED)(function)


@compiled
def pack(x, start, count, out):
    """out (n, BLOCK) = tokens start..start+count of x (T, n), transposed; the rest are zeros."""
    width = out.shape[0]
    for low in range(0, width, 16):
        high = min(low + 16, width)
        for b in range(count):
            row = x[start + b]
            for c in range(low, high):
                out[c, b] = row[c]
        for c in range(low, high):
            for b in range(count, BLOCK):
                out[c, b] = 0


@compiled
def unpack_add(block, start, count, y):
    """y (T, n)[start : start + count] += block (n, BLOCK), transposed."""
    width = block.shape[0]
    for low in range(0, width, 16):
        high = min(low + 16, width)
        for b in range(count):
            row = y[start + b]
            for c in range(low, high):
                row[c] += block[c, b]


@compiled
def add_product(x, values, rows, columns, first, last, y):
    """y (T, out) += x (T, in) times the transpose of the elements, for tokens first..last."""
    packed = np.empty((x.shape[1], BLOCK), x.dtype)
    sums = np.empty((y.shape[1], BLOCK), x.dtype)
    for start in range(first, last, BLOCK):
        count = min(BLOCK, last - start)
        pack(x, start, count, packed)
        sums[:] = 0
        for z in range(values.size):
            value = values[z]
            source = packed[columns[z]]
            target = sums[rows[z]]
            for b in range(BLOCK):
                target[b] += value * source[b]
        unpack_add(sums, start, count, y)


@compiled
def add_gradients(g, x, values, rows, columns, first, last, dvalues, dx):
    """For tokens first..last: dvalues (n,) += sum_t g[t, row] x[t, column]; dx (T, in) += g times
    the elements. g is (T, out). An empty dx (0, 0) or no dvalues (0,) is not computed.
    """
    upper = np.empty((g.shape[1], BLOCK), g.dtype)
    lower = np.empty((x.shape[1], BLOCK), x.dtype)
    sums = np.empty((dx.shape[1], BLOCK), x.dtype)
    for start in range(first, last, BLOCK):
        count = min(BLOCK, last - start)
        pack(g, start, count, upper)
        if dvalues.size:
            pack(x, start, count, lower)
            for z in range(rows.size):
                one, other = upper[rows[z]], lower[columns[z]]
                total = x.dtype.type(0)
                for b in range(BLOCK):
                    total += one[b] * other[b]
                dvalues[z] += total
        if dx.size:
            sums[:] = 0
            for z in range(rows.size):
                value = values[z]
                source, target = upper[rows[z]], sums[columns[z]]
                for b in range(BLOCK):
                    target[b] += value * source[b]
            unpack_add(sums, start, count, dx)
