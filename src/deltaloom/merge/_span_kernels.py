"""Compiled loops of `_span.py`: inner products in lanes, and weighted sums by row."""

from __future__ import annotations

import numpy as np

from deltaloom.merge._kernels import TILE, compiled
from deltaloom.merge._lanes import LANES


@compiled
def add_inner(x, y, start, columns, lanes, sums):
    """sums (rows,) = inner products of the rows of x and y, of which flat elements start..start+n
    are seen here; lanes (16,) float64 carry an unfinished row from block to block.
    """
    done = 0
    while done < x.size:
        row, column = divmod(start + done, columns)
        m = min(columns - column, x.size - done)
        a = x[done : done + m]
        b = y[done : done + m]
        head = min(m, -column % LANES)
        for i in range(head):
            lanes[(column + i) % LANES] += np.float64(a[i]) * np.float64(b[i])
        whole = head + (m - head) // LANES * LANES
        for i in range(head, whole, LANES):
            for j in range(LANES):
                lanes[j] += np.float64(a[i + j]) * np.float64(b[i + j])
        for i in range(whole, m):
            lanes[(column + i) % LANES] += np.float64(a[i]) * np.float64(b[i])
        if column + m == columns:
            total = 0.0
            for j in range(LANES):
                total += lanes[j]
                lanes[j] = 0.0
            sums[row] = total
        done += m


@compiled
def combine(base, models, coefficients, start, columns, out):
    """out (n,) = sum_k coefficients (rows, k) models (k, n), by row, plus base (n,) where it has
    elements. A source at zero has no part, so that the other comes through to the bit.
    """
    total = np.empty(TILE, np.float64)
    done = 0
    while done < out.size:
        row, column = divmod(start + done, columns)
        m = min(columns - column, out.size - done, TILE)
        part = total[:m]
        part[:] = 0.0
        first = True
        for k in range(models.shape[0]):
            factor = coefficients[row, k]
            values = models[k, done : done + m]
            if factor != 0.0 and first:
                first = False
                for i in range(m):
                    part[i] = factor * values[i]
            elif factor != 0.0:
                for i in range(m):
                    part[i] += factor * values[i]
        target = out[done : done + m]
        if base.size:
            origin = base[done : done + m]
            for i in range(m):
                target[i] = origin[i] + part[i] if part[i] != 0.0 else origin[i]
        else:
            for i in range(m):
                target[i] = part[i]
        done += m
