"""Similarity kernels in three forms: dense, the nearest neighbours only, or made when needed.

A kernel has a row for each candidate (what may be chosen) and a column for each point that the
choice should represent; often both are the same pool. Its parts are read by `rows(numbers)`, so a
kernel need not be in memory: n points of d features take 4 n d bytes as `Blockwise`, where the
dense kernel takes 4 n^2, and 8 k n bytes as `Sparse` with k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deltaloom.core.errors import InputError

BLOCK = 2**24
"""Similarities in one block, 64 MiB."""

Rows = NDArray[np.float32]
Flat = tuple[Rows, NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]
"""values, columns, and the starts and ends (n,) of each candidate's part of them."""


class Kernel(Protocol):
    """What every form can do."""

    @property
    def shape(self) -> tuple[int, int]:
        """Candidates n and represented points m."""
        ...

    def rows(self, numbers: Any) -> Rows:
        """Similarities (b, m) of the candidates `numbers`, an index array or a slice."""
        ...

    def diagonal(self) -> Rows:
        """Each candidate's similarity with the point of its number, (n,) for a square kernel."""
        ...


@dataclass(frozen=True)
class Dense:
    """The whole matrix."""

    matrix: Rows

    @classmethod
    def of(cls, matrix: Any, name: str = "kernel") -> Dense:
        """A kernel from (n, m) similarities, candidates first.

        Raises InputError for another shape, and for NaN or infinity, naming the row.
        """
        return cls(_checked(matrix, name))

    @property
    def shape(self) -> tuple[int, int]:
        """Candidates n and represented points m."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def rows(self, numbers: Any) -> Rows:
        """Similarities (b, m) of some candidates."""
        return self.matrix[numbers]

    def diagonal(self) -> Rows:
        """Each candidate's similarity with itself, (n,)."""
        return self.matrix.diagonal()

    def flat(self) -> Flat:
        """The form that compiled loops take; no columns mean every one."""
        n, m = self.shape
        starts = np.arange(n) * m
        return self.matrix.reshape(-1), np.empty(0, np.int32), starts, starts + m


@dataclass(frozen=True)
class Sparse:
    """Some entries of each row; all others are zero."""

    values: Rows
    columns: NDArray[np.int32]
    starts: NDArray[np.int64]
    represented: int

    @classmethod
    def of(cls, matrix: Any, name: str = "kernel") -> Sparse:
        """A kernel from a `scipy.sparse` matrix (n, m), candidates first.

        Raises InputError for NaN or infinity, naming the row.
        """
        rows = matrix.tocsr(copy=True)
        rows.sum_duplicates()
        rows.sort_indices()
        wrong = np.flatnonzero(~np.isfinite(rows.data))
        if len(wrong):
            row = int(np.searchsorted(rows.indptr, wrong[0], side="right")) - 1
            raise InputError(_not_finite(name, row))
        return cls(
            rows.data.astype(np.float32),
            rows.indices.astype(np.int32),
            rows.indptr.astype(np.int64),
            rows.shape[1],
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Candidates n and represented points m."""
        return len(self.starts) - 1, self.represented

    def rows(self, numbers: Any) -> Rows:
        """Similarities (b, m) of some candidates, with the zeros."""
        picked = np.arange(self.shape[0])[numbers]
        out = np.zeros((len(picked), self.represented), np.float32)
        for row, j in zip(out, picked, strict=True):
            own = slice(self.starts[j], self.starts[j + 1])
            row[self.columns[own]] = self.values[own]
        return out

    def diagonal(self) -> Rows:
        """Each candidate's similarity with itself, (n,)."""
        return self.matrix().diagonal()

    def matrix(self) -> Any:
        """The same as a `scipy.sparse` matrix."""
        from scipy import sparse

        return sparse.csr_matrix((self.values, self.columns, self.starts), shape=self.shape)

    def flat(self) -> Flat:
        """A copy in the form that compiled loops take, as they shorten rows."""
        values, columns = self.values.copy(), self.columns.copy()
        if not len(columns):  # none would mean every one
            values, columns = np.zeros(1, np.float32), np.zeros(1, np.int32)
        return values, columns, self.starts[:-1].copy(), self.starts[1:].copy()


@dataclass(frozen=True)
class Blockwise:
    """Inner products, made a few rows at a time and never kept.

    Picks equal those of the dense kernel up to the rounding of products, about 1e-7.
    """

    candidates: Rows
    """(n, d)"""
    represented: Rows
    """(d, m): products with few rows are faster this way round."""
    symmetric: bool
    """Whether candidates and represented points are the same."""

    @classmethod
    def of(cls, candidates: Any, represented: Any = None, name: str = "features") -> Blockwise:
        """A kernel from features (n, d) and (m, d), the same ones when one is left out.

        Raises InputError for widths that differ, and for NaN or infinity, naming the row.
        """
        left = _checked(candidates, name)
        right = left if represented is None else _checked(represented, name)
        _same_width(left, right)
        return cls(left, np.ascontiguousarray(right.T), represented is None)

    @property
    def shape(self) -> tuple[int, int]:
        """Candidates n and represented points m."""
        return len(self.candidates), self.represented.shape[1]

    def rows(self, numbers: Any) -> Rows:
        """Similarities (b, m) of some candidates."""
        return self.candidates[numbers] @ self.represented

    def diagonal(self) -> Rows:
        """Each candidate's similarity with itself, (n,)."""
        return np.einsum("nd,dn->n", self.candidates, self.represented)


def blocks(kernel: Kernel) -> Iterator[tuple[slice, Rows]]:
    """All rows of a kernel in blocks of at most 64 MiB."""
    n, m = kernel.shape
    step = max(1, BLOCK // max(m, 1))
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        yield part, kernel.rows(part)


def is_symmetric(kernel: Kernel) -> bool:
    """Whether candidates and points are the same, and similar both ways up to rounding."""
    n, m = kernel.shape
    if n != m:
        return False
    if isinstance(kernel, Blockwise):
        return kernel.symmetric
    if isinstance(kernel, Sparse):
        matrix = kernel.matrix()
        return abs(matrix - matrix.T).max() <= 1e-5
    step = max(1, BLOCK // 16 // n)
    parts = (slice(start, start + step) for start in range(0, n, step))
    matrix = kernel.rows(slice(None))
    return all(np.allclose(matrix[part], matrix[:, part].T, rtol=1e-4, atol=1e-5) for part in parts)


def nearest(
    candidates: Any, neighbours: int, represented: Any = None, *, symmetric: bool = False
) -> Sparse:
    """The kernel of inner products with each represented point's nearest candidates only.

    Args:
        candidates: Features (n, d).
        neighbours: Candidates kept for each represented point; n at most.
        represented: Features (m, d); the candidates themselves when left out.
        symmetric: Also keep each pair the other way round.

    Raises:
        InputError: Widths differ, `neighbours` is not within 1 and n, or a row is not finite.
    """
    from scipy import sparse

    points = candidates if represented is None else represented
    places, values = neighbours_of(points, candidates, neighbours)
    m, k = places.shape
    starts = np.arange(m + 1) * k
    by_point = sparse.csr_matrix(
        (values.reshape(-1), places.reshape(-1), starts), shape=(m, len(candidates))
    )
    by_candidate = by_point.T.tocsr()
    if symmetric:
        by_candidate = by_candidate.maximum(by_point)
    return Sparse.of(by_candidate)


def neighbours_of(
    points: Any, candidates: Any, neighbours: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Each point's nearest candidates by inner product: numbers and products (m, k).

    Nearest first; of equals the first. Raises InputError as `nearest` does.
    """
    from deltaloom.engine import _greedy

    left = _checked(points, "features")
    right = left if candidates is points else _checked(candidates, "features")
    _same_width(left, right)
    if not 1 <= neighbours <= len(right):
        raise InputError(
            f"neighbours = {neighbours}: must be from 1 to the number of candidates, {len(right)}"
        )
    places = np.empty((len(left), neighbours), np.int32)
    values = np.empty((len(left), neighbours), np.float32)
    for part, rows in blocks(Blockwise.of(left, right)):
        _greedy.largest(rows, places[part], values[part])
    return places, values


def unit_rows(features: Any, name: str = "features") -> Rows:
    """Rows (n, d) scaled to length 1, so that inner products are cosines; zero rows stay zero."""
    rows = _checked(features, name)
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    return rows / np.where(lengths > 0, lengths, 1.0)[:, None].astype(np.float32)


def _checked(matrix: Any, name: str) -> Rows:
    rows = np.require(matrix, np.float32, ["C", "W"])  # compiled loops are made for writable arrays
    if rows.ndim != 2 or 0 in rows.shape:
        raise InputError(f"the {name} must be a matrix with rows and columns, not {rows.shape}")
    step = max(1, BLOCK // 16 // rows.shape[1])
    for start in range(0, len(rows), step):
        fine = np.isfinite(rows[start : start + step]).all(axis=1)
        if not fine.all():
            raise InputError(_not_finite(name, start + int(fine.argmin())))
    return rows


def _not_finite(name: str, row: int) -> str:
    return f"row {row} of the {name} has a value that is not finite; compute that row again"


def _same_width(left: Rows, right: Rows) -> None:
    if left.shape[1] != right.shape[1]:
        raise InputError(
            f"features of width {left.shape[1]} and of width {right.shape[1]} have no inner "
            "product; make both by the same model and settings"
        )
