"""Greedy maximisation of sum_i min(max(low_i, max_{j in A} s_ij), cap_i) over sets A."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaloom.engine import _greedy
from deltaloom.engine.similarity import Dense, Sparse, blocks

FRONT = 256
"""Candidates evaluated at once, at most, where rows are made when needed."""
ENTRIES = 2**27
"""Entries of a kernel that may be kept beside it, 1 GiB."""
SHARE = 1 / 5
"""Share of a kernel's entries at which keeping them beside it pays."""
SAMPLE = 64
"""Rows from which that share is estimated."""


class Cover:
    """A cover under construction: what each point has, and a bound of each candidate's gain."""

    def __init__(self, kernel: Any, low: NDArray[Any], cap: NDArray[Any], budget: int) -> None:
        self.kernel = kernel
        self.low, self.cap = low, cap
        n = kernel.shape[0]
        self.bounds = np.empty(n, np.float32)
        if isinstance(kernel, Dense | Sparse):
            self.flat = kernel.flat()
            _greedy.all_gains(*self.flat, low, cap, self.bounds)
        else:
            self.flat = None
            for part, rows in blocks(kernel):
                _greedy.row_gains(rows, low, cap, self.bounds[part])
        self.alone = self.bounds.copy()
        self.computed = np.full(n, -1)  # the round of each bound
        self.members = np.arange(n)
        self.picks, self.gains = np.empty(budget, np.int64), np.empty(budget, np.float32)
        self.done = self.evaluations = 0

    def lazy(self) -> None:
        """Fill the budget, each time with the best of all."""
        small = isinstance(self.kernel, Sparse)
        allowed = len(self.bounds) // 2
        while self.done < len(self.picks):
            if not small and self.evaluations >= allowed:
                # A pass over the kernel costs as much as what was spent so far.
                small = self._shrink()
                allowed *= 2
            self._advance(2**62 if small else allowed - self.evaluations)

    def _advance(self, most: int) -> None:
        """Picks until the budget is filled or `most` evaluations were made."""
        if self.flat is None:
            goal = self.evaluations + most
            while self.done < len(self.picks) and self.evaluations < goal:
                self.pick(self.members)
            return
        at = slice(self.done, None)
        heap = self.members.copy()
        made, evaluations = _greedy.lazy(
            *self.flat, self.low, self.cap, self.bounds, heap, self.picks[at], self.gains[at], most
        )
        self.members = np.setdiff1d(self.members, self.picks[self.done : self.done + made])
        self.done += made
        self.evaluations += evaluations

    def _shrink(self) -> bool:
        """Keep only the entries that can still add something, once they are few enough.

        What a point has only grows, so the others never count again: after t picks of unrelated
        candidates about one entry in t + 1 is left.
        """
        n, m = self.kernel.shape
        sample = self.kernel.rows(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))
        share = _greedy.useful(sample, self.low, self.cap) / sample.size
        if share > SHARE or share * n * m > ENTRIES:
            return False
        size = int(1.2 * share * n * m) + 2 * m
        values, columns = np.empty(size, np.float32), np.empty(size, np.int32)
        edges = np.zeros(n + 1, np.int64)
        filled = 0
        for part, rows in blocks(self.kernel):
            ends = edges[part.start + 1 : part.stop + 1]
            while len(rows):
                done, filled = _greedy.keep_useful(
                    rows, self.low, self.cap, values, columns, filled, ends
                )
                rows, ends = rows[done:], ends[done:]
                if len(rows):  # the sample was not like the rest
                    values, columns = (_longer(each) for each in (values, columns))
        self.flat = values, columns, edges[:-1].copy(), edges[1:].copy()
        return True

    def stochastic(self, eps: float, seed: int) -> None:
        """Fill the budget, each time with the best of a random sample."""
        random = np.random.default_rng(seed)
        rest, budget = self.members, len(self.picks)
        size = math.ceil(len(rest) / budget * math.log(1 / eps))
        for left in range(len(rest), len(rest) - budget, -1):
            places = random.choice(left, min(size, left), replace=False, shuffle=False)
            places = places[np.argsort(rest[places])]
            best = self.pick(rest[places])
            rest[places[np.searchsorted(rest[places], best)]] = rest[left - 1]

    def pick(self, members: NDArray[np.int64]) -> int:
        """Choose the best of `members`, which ascend."""
        best = self._by_rows(members) if self.flat is None else self._by_loop(members)
        self.picks[self.done], self.gains[self.done] = best, self.bounds[best]
        if members is self.members:
            self.members = np.delete(members, np.searchsorted(members, best))
        self.done += 1
        return best

    def _by_loop(self, members: NDArray[np.int64]) -> int:
        assert self.flat is not None
        order = members[np.argsort(-self.bounds[members], kind="stable")]
        best, evaluations = _greedy.best_of(*self.flat, self.low, self.cap, self.bounds, order)
        self.evaluations += evaluations
        _greedy.raise_low(*self.flat, best, self.low, self.cap)
        return best

    def _by_rows(self, members: NDArray[np.int64]) -> int:
        best, best_row, size = -1, self.low, 16
        while True:
            front = np.empty(size, np.int64)
            found = _greedy.front(self.bounds, self.computed, self.done, members, best, front)
            if not found:
                break
            front = front[:found]
            rows = self.kernel.rows(front)
            gains = np.empty(found, np.float32)
            _greedy.row_gains(rows, self.low, self.cap, gains)
            self.bounds[front], self.computed[front] = gains, self.done
            self.evaluations += found
            at = int(np.lexsort((front, -gains))[0])
            if best < 0 or (-gains[at], front[at]) < (-self.bounds[best], best):
                best, best_row = int(front[at]), rows[at]
            size = min(2 * size, FRONT)
        _greedy.raise_row(best_row, self.low, self.cap)
        return best


def _longer(array: NDArray[Any]) -> NDArray[Any]:
    """`array` with room for half as much again."""
    longer = np.empty(len(array) * 3 // 2, array.dtype)
    longer[: len(array)] = array
    return longer
