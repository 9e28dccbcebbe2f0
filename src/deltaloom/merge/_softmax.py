"""The compiled loop of `arcee_fusion`: how far rows of weights, read as logits, diverge."""

from __future__ import annotations

import numpy as np

from deltaloom.merge._kernels import compiled

SMALL = 1e-8
"""Added to every probability, as the method has it."""


@compiled
def divergences(left, right, columns, out):
    """out (rows,) = sum p log(p / q) of the rows of left and right (rows * columns,), with p and q
    their softmax plus 1e-8; float64 inside, at least 0.
    """
    for row in range(out.size):
        x = left[row * columns : (row + 1) * columns]
        y = right[row * columns : (row + 1) * columns]
        top_x = np.float64(x.max())
        top_y = np.float64(y.max())
        sum_x = 0.0
        sum_y = 0.0
        for i in range(columns):
            sum_x += np.exp(x[i] - top_x)
            sum_y += np.exp(y[i] - top_y)
        total = 0.0
        for i in range(columns):
            p = np.exp(x[i] - top_x) / sum_x + SMALL
            q = np.exp(y[i] - top_y) / sum_y + SMALL
            total += p * np.log(p / q)
        out[row] = total if not total < 0.0 else 0.0
