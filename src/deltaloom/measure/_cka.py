"""Linear centred kernel alignment with unbiased HSIC, and its jackknife.

Kornblith et al. 2019 (arXiv 1905.00414): CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with
K = X X', L = Y Y'. The unbiased HSIC is Song et al. 2012 (JMLR 13, equation 5), as Nguyen et al.
2021 (arXiv 2010.15327) use it: the usual estimator calls any two wide representations of few
examples alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def cka(first: Any, second: Any) -> float:
    """Alignment of two representations (n, h) and (n, h') of the same n >= 4 examples.

    1 for a rotation, scaling or shift of one another, near 0 for unrelated ones (below 0 by
    chance). NaN where one of them does not vary.
    """
    return _aligned(*(_sums(*pair) for pair in _kernels(first, second)))[0]


def cka_jackknife(first: Any, second: Any) -> tuple[float, Array]:
    """`cka` of n >= 5 examples, and its (n,) pseudo-values n C - (n - 1) C without the example.

    Their mean is the jackknife estimate, from which the bias of the ratio is removed to first
    order, and their spread gives its standard error. Memory: 4 n^2 numbers of float64.
    """
    sums = [_sums(*pair) for pair in _kernels(first, second)]
    whole = _aligned(*sums)
    without = _aligned(*(one.without_each() for one in sums))
    n = len(without)
    return float(whole[0]), n * whole - (n - 1) * without


@dataclass(frozen=True)
class _Sums:
    """What HSIC(K, L) needs of two kernels with zero diagonals, and what each example adds."""

    n: int
    trace: Array
    """tr(K L), (1,) or one for each example left out."""
    k: Array
    """1' K 1."""
    l: Array  # noqa: E741
    both: Array
    """1' K L 1."""
    own: tuple[Array, Array, Array, Array]
    """What leaving each example out takes off the four, (n,)."""

    def hsic(self) -> Array:
        """The unbiased estimator."""
        n = self.n
        middle = self.k * self.l / ((n - 1) * (n - 2))
        return (self.trace + middle - 2 * self.both / (n - 2)) / (n * (n - 3))

    def without_each(self) -> _Sums:
        """The sums with each example left out in turn."""
        trace, k, l, both = self.own  # noqa: E741
        return _Sums(
            self.n - 1, self.trace - trace, self.k - k, self.l - l, self.both - both, self.own
        )


def _sums(k: Array, l: Array) -> _Sums:  # noqa: E741
    rows, columns = k.sum(1), l.sum(1)
    pairs = (k * l).sum(1)
    both = rows * columns + k @ columns + l @ rows - pairs
    return _Sums(
        len(k),
        np.array([pairs.sum()]),
        np.array([rows.sum()]),
        np.array([columns.sum()]),
        np.array([rows @ columns]),
        (2 * pairs, 2 * rows, 2 * columns, both),
    )


def _aligned(both: _Sums, first: _Sums, second: _Sums) -> Array:
    scale = first.hsic() * second.hsic()
    return both.hsic() / np.sqrt(np.where(scale > 0, scale, np.nan))


def _kernels(first: Any, second: Any) -> list[tuple[Array, Array]]:
    k, l = _kernel(first), _kernel(second)  # noqa: E741
    return [(k, l), (k, k), (l, l)]


def _kernel(rows: Any) -> Array:
    """(n, n) inner products with a zero diagonal."""
    rows = np.asarray(rows, dtype=np.float64)
    rows = rows - rows.mean(0)  # changes nothing but the size of the numbers
    kernel = rows @ rows.T
    np.fill_diagonal(kernel, 0.0)
    return kernel
