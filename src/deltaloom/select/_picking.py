"""From scores to an order of choice: the rules that every scoring selector shares.

`top` takes the best first. `round_robin` lets the target's rows take turns, so that no easy one
fills the budget (Nayak et al. 2026, "A Critical Look at Targeted Instruction Selection": best on
average at small budgets).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deltaloom.core.examples import Examples

Pick = Literal["top", "round_robin"]


def top(scores: np.ndarray, count: int) -> NDArray[np.int64]:
    """Row numbers of the `count` largest of `scores` (n,), largest first; of equals the first.

    All n when `count` is larger. Raises ValueError for scores that are not numbers.
    """
    import numpy as np

    scores = np.asarray(scores)
    if np.isnan(scores).any():
        raise ValueError("some scores are not numbers")
    count = min(count, len(scores))
    if count <= 0:
        return np.empty(0, np.int64)
    # Sorting only what can be chosen: 20 times less than everything at 5 %.
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    rows = np.flatnonzero(scores >= least)
    return rows[np.argsort(-scores[rows], kind="stable")][:count]


def round_robin(influence: np.ndarray, count: int) -> NDArray[np.int64]:
    """`count` row numbers of `influence` (n, q): each query in turn takes its best unused row.

    Query 0 begins; of equals the first row is taken. All n when `count` is larger. The row at
    place k of the answer was taken by query k % q. Raises ValueError for values that are not
    numbers.
    """
    import numpy as np

    rows, queries = influence.shape
    count = min(count, rows) if queries else 0
    # Before its last turn a query has met fewer than `count` used rows.
    best = [top(influence[:, query], count) for query in range(min(queries, count))]
    place = [0] * len(best)
    used = np.zeros(rows, dtype=bool)
    order = np.empty(count, np.int64)
    for turn in range(count):
        query = turn % queries
        place[query] = _first_unused(best[query], place[query], used)
        order[turn] = best[query][place[query]]
        used[order[turn]] = True
    return order


def by_pick(
    pick: Pick, influence: np.ndarray, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers in order of choice, and for each the query (column) that it was chosen for.

    `top` ranks rows by their largest influence (n, q) on any query.
    """
    import numpy as np

    if pick == "top":
        order = top(influence.max(axis=1), count)
        return order, influence[order].argmax(axis=1)
    order = round_robin(influence, count)
    return order, np.arange(len(order)) % influence.shape[1]


def chosen_for(
    chosen: Examples, pool: Examples, order: np.ndarray, queries: np.ndarray
) -> dict[str, int]:
    """Id of each chosen row -> the query that it was chosen for, from what `by_pick` gave."""
    kept = set(chosen.ids)
    ids = pool.ids
    return {
        ids[row]: int(query) for row, query in zip(order, queries, strict=True) if ids[row] in kept
    }


def _first_unused(rows: np.ndarray, start: int, used: np.ndarray, block: int = 256) -> int:
    """The first place from `start` on whose row is not used; there must be one."""
    while True:
        free = ~used[rows[start : start + block]]
        here = int(free.argmax())
        if free[here]:
            return start + here
        start += block
