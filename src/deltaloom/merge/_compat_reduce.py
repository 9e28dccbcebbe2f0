"""Sums in float32 in the order in which torch adds on a processor: what mergekit's sums come to.

torch's sum keeps 4 x 8 partial sums over blocks that are added up level by level. Its norm keeps 8
of squares, to which four of the last seven are added and the rest unrounded, as its compiler chose;
of float16 it adds one by one. All were found by comparing to the bit, with AVX2 and AVX-512 alike,
on one thread. float64 numbers are added in the same order, which is then not torch's.
"""

from __future__ import annotations

import numpy as np

from deltaloom.merge._compat_kernels import fused
from deltaloom.merge._kernels import compiled

WIDTH = 8
STEP = 4 * WIDTH
"""Blocks must be cut at multiples of this, or at ends of vectors."""
LEVELS = 4


@compiled
def add_cascade(values, start, columns, total, most, levels, sums):
    """sums (rows,) = sums of the vectors of `columns` elements (the last may be shorter) of a
    tensor of `total`, of which flat elements start..start+n are seen here; levels (4, 32) carry an
    unfinished vector from block to block. Vectors of `most` (8) elements and more are added in
    eights, others one by one, in four sums each.
    """
    done = 0
    while done < values.size:
        row, column = divmod(start + done, columns)
        length = min(columns, total - row * columns)
        m = min(length - column, values.size - done)
        part = values[done : done + m]
        width = most if length >= most else 1
        step = 4 * width
        steps = length // step
        power = 0
        while (1 << power) < steps:
            power += 1
        power = max(4, power // LEVELS)
        first = levels[0]
        i = column // step
        at = 0
        while i < steps and at + step <= m:
            for j in range(step):
                first[j] += part[at + j]
            at += step
            i += 1
            if i % (1 << power) == 0:
                for level in range(1, LEVELS):
                    for j in range(step):
                        levels[level, j] += levels[level - 1, j]
                        levels[level - 1, j] = 0
                    if i & (((1 << power) - 1) << (level * power)):
                        break
        if column + m == length:
            for level in range(1, LEVELS):
                for j in range(step):
                    first[j] += levels[level, j]
            whole = length // width * width - column
            while at < whole:
                for j in range(width):
                    first[j] += part[at + j]
                at += width
            for k in range(1, 4):
                for j in range(width):
                    first[j] += first[k * width + j]
            rest = values.dtype.type(0)
            while at < m:
                rest += part[at]
                at += 1
            for j in range(width):
                rest += first[j]
            sums[row] = rest
            levels[:] = 0
        done += m


@compiled
def add_squares(values, start, columns, total, lanes, sums):
    """The same of squares, as torch's norm adds them: in lanes (8,), or lanes (1,) one by one."""
    width = lanes.size
    done = 0
    while done < values.size:
        row, column = divmod(start + done, columns)
        length = min(columns, total - row * columns)
        m = min(length - column, values.size - done)
        part = values[done : done + m]
        whole = min(m, length - length % width - column) // width * width
        for i in range(0, whole, width):
            for j in range(width):
                lanes[j] += part[i + j] * part[i + j]
        if column + m == length:
            square = lanes[0]
            for j in range(1, width):
                square += lanes[j]
            fours = whole + (m - whole) // 4 * 4
            for i in range(whole, fours):
                square += part[i] * part[i]
            for i in range(fours, m):
                square = fused(part[i], part[i], square)  # pyright: ignore[reportCallIssue]
            sums[row] = square
            lanes[:] = 0
        done += m


class Reduction:
    """A sum, or one of squares in `lanes`, of each vector of a tensor; blocks in rising order."""

    def __init__(
        self, columns: int, total: int, work: type, *, squares: bool = False, lanes: int = WIDTH
    ):
        self.columns, self.total, self.squares = columns, total, squares
        self.carried = np.zeros(lanes if squares else (LEVELS, STEP), work)
        self.sums = np.zeros(-(-total // columns), work)

    def add(self, values: np.ndarray, start: int) -> None:
        """See flat elements start..start+n."""
        flat, where = values.reshape(-1), (start, self.columns, self.total)
        if self.squares:
            add_squares(flat, *where, self.carried, self.sums)
        else:
            add_cascade(flat, *where, WIDTH, self.carried, self.sums)


def down(values: np.ndarray, *, plain: bool) -> np.ndarray:
    """The sums (rows,) of vectors (rows, n) that lie across memory: `plain` first to last, or as
    torch's sum does, by levels of at least 16, and the last rows, up to 31, in four sums each.
    """
    rows, count = values.shape
    if rest := 0 if plain else rows % STEP:
        sums = np.zeros(rest, values.dtype)
        levels = np.zeros((LEVELS, STEP), values.dtype)
        last = np.ascontiguousarray(values[rows - rest :]).ravel()
        add_cascade(last, 0, count, last.size, 1, levels, sums)
        return np.concatenate([down(values[: rows - rest], plain=False), sums])
    levels = np.zeros((LEVELS, rows), values.dtype)
    power = max(4, (count - 1).bit_length() // LEVELS)
    for i, column in enumerate(values.T, 1):
        levels[0] += column
        if plain or i % (1 << power):
            continue
        for level in range(1, LEVELS):
            levels[level] += levels[level - 1]
            levels[level - 1] = 0
            if i & (((1 << power) - 1) << (level * power)):
                break
    for level in range(1, LEVELS):
        levels[0] += levels[level]
    return levels[0]


def whole(values: np.ndarray, *, squares: bool = False) -> np.floating:
    """The sum, or the sum of squares, of a vector."""
    one = Reduction(max(values.size, 1), values.size, values.dtype.type, squares=squares)
    one.add(values, 0)
    return one.sums[0]
