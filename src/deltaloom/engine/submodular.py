"""Submodular functions of a chosen set, maximised greedily under a budget.

For similarities s_ij of points i with candidates j, and a set A of candidates:

    facility_location    sum_i max_{j in A} s_ij
    mutual_information   sum_i min(max_{j in A} s_ij, eta max_{q in Q} s_iq)
    conditional_gain     sum_i max(max_{j in A} s_ij - nu max_{p in P} s_ip, 0)
    graph_cut            sum_i sum_{j in A} s_ij - redundancy sum_{i in A, j in A} s_ij
    log_det              log det(I + K_A / ridge)

The first three are one: sum_i min(max(low_i, max_j s_ij), cap_i) with (low, cap) = (0, inf),
(0, eta max_q s_iq), (nu max_p s_ip, inf). Negative similarities count as zero, except for log_det,
whose K must be positive semidefinite. Sources: Mirchandani & Francis 1990 (facility location);
Iyer et al. 2021, "Submodular Combinatorial Information Measures" (the next two); Chen, Zhang, Zhou
2018 (greedy log_det by an incremental Cholesky factor).

Greedy reaches (1 - 1/e) of the optimum for all but graph_cut with redundancy above 1/2 (Nemhauser,
Wolsey, Fisher 1978). `lazy` evaluates only what may have become best and picks exactly what plain
greedy picks; `stochastic` looks at a random sample of ceil(n / k log(1/eps)) candidates for each
pick and reaches (1 - 1/e - eps) in expectation (Mirzasoleiman et al. 2015). Of equal gains the
candidate with the lowest index is picked, whatever the form of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deltaloom.core.errors import InputError
from deltaloom.engine.similarity import Kernel, Sparse, blocks, is_symmetric

Greedy = Literal["lazy", "stochastic"]


@dataclass(frozen=True)
class Picks:
    """A chosen set in order of choice."""

    indices: NDArray[np.int64]
    """Candidates (k,)."""
    gains: NDArray[np.float64]
    """What each added to the function's value (k,)."""
    alone: NDArray[np.float32]
    """The function's value of each candidate alone (n,)."""
    evaluations: int
    """Gains computed after the first n."""

    @property
    def value(self) -> float:
        """The function's value of the whole set."""
        return math.fsum(self.gains)


@dataclass(frozen=True)
class How:
    """How to maximise; the default keeps greedy's guarantee."""

    greedy: Greedy = "lazy"
    eps: float = 0.1
    """Of stochastic greedy only."""
    seed: int = 0
    """Of stochastic greedy only."""


LAZY = How()


def facility_location(kernel: Kernel, budget: int, how: How = LAZY) -> Picks:
    """Candidates that every point has a similar one among.

    Raises InputError for a budget that is not from 1 to the number of candidates, as all do.
    """
    points = kernel.shape[1]
    return _cover(kernel, budget, np.zeros(points), np.full(points, np.inf), how)


def mutual_information(
    kernel: Kernel, budget: int, queries: Kernel, eta: float = 1.0, how: How = LAZY
) -> Picks:
    """Candidates that represent the points as far as the queries do.

    `queries` (q, m) holds the queries' similarities with the same m points. `eta` is how much of
    that counts: larger ones weigh representation more. Raises InputError when m differs.
    """
    cap = _factor("eta", eta) * _largest(queries, kernel, "queries")
    return _cover(kernel, budget, np.zeros(kernel.shape[1]), cap, how)


def conditional_gain(
    kernel: Kernel, budget: int, given: Kernel, nu: float = 1.0, how: How = LAZY
) -> Picks:
    """Candidates that represent what the given ones do not.

    `given` (p, m) holds the given ones' similarities with the same m points, `nu` is how strictly
    they are avoided. Raises InputError when m differs.
    """
    low = _factor("nu", nu) * _largest(given, kernel, "given")
    return _cover(kernel, budget, low, np.full(kernel.shape[1], np.inf), how)


def graph_cut(kernel: Kernel, budget: int, redundancy: float = 0.5) -> Picks:
    """Candidates similar to all points and, weighted by `redundancy`, not to one another.

    The kernel must be symmetric: candidates are the points. Gains fall below zero for redundancy
    above 1/2, where greedy has no guarantee.
    """
    from deltaloom.engine import _greedy

    _check_square(kernel, budget, "graph cut")
    _factor("redundancy", redundancy)
    n = kernel.shape[0]
    total = np.zeros(n)
    for _, rows in blocks(kernel):
        _greedy.fold(rows, total)
    alone = total - redundancy * np.maximum(kernel.diagonal(), 0)
    within = np.zeros(n)  # sum of similarities with what is chosen

    def gains() -> NDArray[np.float64]:
        return alone - 2 * redundancy * within

    def add(pick: int) -> None:
        _greedy.fold(kernel.rows([pick]), within)

    return _one_by_one(n, budget, gains, add)


def log_det(kernel: Kernel, budget: int, ridge: float = 1.0) -> Picks:
    """Candidates that span the largest volume: a determinantal process's most likely set.

    `ridge` is the variance of noise under which similarities are judged: small ones ask for more
    diversity. Takes 8 n k bytes for k picks. Raises InputError for a kernel of neighbours, which
    is not positive semidefinite, and for one that turns out not to be.
    """
    if isinstance(kernel, Sparse):
        raise InputError(
            "log det needs all similarities: a kernel of neighbours is not positive semidefinite; "
            "leave out neighbours="
        )
    _check_square(kernel, budget, "log det")
    if not 0 < ridge < math.inf:
        raise InputError(f"ridge = {ridge}: must be a number above 0")
    n = kernel.shape[0]
    own = kernel.diagonal().astype(np.float64) / ridge
    left = 1 + own  # less what the chosen ones explain; at least 1, but for rounding
    least = 0.99 - 1e-5 * own
    factor = np.zeros((budget, n))  # rows of the Cholesky factor
    chosen = 0

    def gains() -> NDArray[np.float64]:
        return np.log(np.maximum(left, np.finfo(np.float64).tiny))

    def add(pick: int) -> None:
        nonlocal chosen
        row = kernel.rows([pick])[0].astype(np.float64) / ridge
        row[pick] += 1
        row -= factor[:chosen, pick] @ factor[:chosen]
        if left[pick] < least[pick] or row[pick] <= 0:
            raise InputError(
                "the kernel is not positive semidefinite, as log det needs it; use inner products"
            )
        factor[chosen] = row / math.sqrt(row[pick])
        left[:] -= factor[chosen] ** 2
        chosen += 1

    return _one_by_one(n, budget, gains, add)


FUNCTIONS: dict[str, Callable[..., Picks]] = {
    "facility": facility_location,
    "flmi": mutual_information,
    "flcg": conditional_gain,
    "graphcut": graph_cut,
    "logdet": log_det,
}
"""Short names, as methods use them."""


def _cover(kernel: Kernel, budget: int, low: Any, cap: Any, how: How) -> Picks:
    """Maximise sum_i min(max(low_i, max_j s_ij), cap_i) - low_i."""
    _check_budget(kernel, budget)
    if not 0 < how.eps < 1:
        raise InputError(f"eps = {how.eps}: must be above 0 and below 1")
    from deltaloom.engine._cover import Cover

    cover = Cover(kernel, low.astype(np.float32), cap.astype(np.float32), budget)
    if how.greedy == "stochastic":
        cover.stochastic(how.eps, how.seed)
    else:
        cover.lazy()
    return Picks(cover.picks, cover.gains.astype(np.float64), cover.alone, cover.evaluations)


def _one_by_one(
    n: int, budget: int, gains: Callable[[], NDArray[np.float64]], add: Callable[[int], None]
) -> Picks:
    """Plain greedy for functions whose gains are all known at every step.

    Gains within a millionth of the best are equal: similarities are float32, and those of unit
    rows with themselves are 1 up to rounding.
    """
    picks, found = np.empty(budget, np.int64), np.empty(budget)
    free = np.ones(n, dtype=bool)
    alone = gains().astype(np.float32)
    for t in range(budget):
        now = gains()
        best = now[free].max()
        pick = int(np.argmax(free & (now >= best - 1e-6 * abs(best))))
        picks[t], found[t] = pick, now[pick]
        free[pick] = False
        add(pick)
    return Picks(picks, found, alone, 0)


def _largest(others: Kernel, kernel: Kernel, name: str) -> NDArray[np.float32]:
    """(m,): each point's largest similarity with any of `others`, at least zero."""
    if others.shape[1] != kernel.shape[1]:
        raise InputError(
            f"the {name} have similarities with {others.shape[1]} points and the candidates with "
            f"{kernel.shape[1]}: both need the same points as columns"
        )
    found = np.zeros(kernel.shape[1], np.float32)
    for _, rows in blocks(others):
        np.maximum(found, rows.max(axis=0), out=found)
    return found


def _factor(name: str, value: float) -> np.float32:
    if not 0 <= value < math.inf:
        raise InputError(f"{name} = {value}: must be a number of at least 0")
    return np.float32(value)


def _check_budget(kernel: Kernel, budget: int) -> None:
    if not 1 <= budget <= kernel.shape[0]:
        raise InputError(
            f"a budget of {budget}: must be from 1 to the number of candidates, {kernel.shape[0]}"
        )


def _check_square(kernel: Kernel, budget: int, name: str) -> None:
    _check_budget(kernel, budget)
    if not is_symmetric(kernel):
        n, m = kernel.shape
        raise InputError(
            f"{name} needs a symmetric kernel, of the candidates with themselves; this one is "
            f"{n} x {m}" + ("" if n != m else " and not symmetric")
        )
