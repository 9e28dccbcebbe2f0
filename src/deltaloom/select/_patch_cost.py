"""What tail patches may cost: how many steps and looks a share of a training run pays for."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Design:
    """How patches are made."""

    rungs: int
    """Looks at the source that is looked at most often."""
    each: int
    """Optimizer steps between two of them."""
    tokens: int
    """What all patches and the looks after them take at most."""

    @property
    def steps(self) -> int:
        """On the source that gets most."""
        return self.rungs * self.each


class Prices:
    """Tokens of patches: `lengths` are those of each source's rows in the order they are taken,
    again and again; a step takes `batch` rows and a look at the targets `look` tokens.
    """

    def __init__(self, lengths: Iterable[Sequence[int]], batch: int, look: int) -> None:
        self.batch, self.look = batch, look
        self._sums = [[0, *accumulate(own)] for own in lengths]

    def most(self, rungs: int, each: int) -> int:
        """The most that so many looks, `each` steps apart, can take.

        All sources get the first rung and at most half of them, rounded up, each next one; which
        ones is not known before, so it is those with the longest rows.
        """
        total, going = 0, len(self._sums)
        for rung in range(rungs):
            patches = sorted((self._patch(sums, rung, each) for sums in self._sums), reverse=True)
            total += sum(patches[:going]) + going * self.look
            going = math.ceil(going / 2)
        return total

    def best(self, rungs: Iterable[int], steps: int, budget: int) -> Design | None:
        """The design within `budget` whose best source gets the most steps, no more than `steps`;
        of equals the cheapest. None where a single step on each is too much.
        """
        found = []
        for count in rungs:
            apart = range(1, steps // count + 1)
            # Tokens grow with steps but for a row's length or two; what is found fits either way.
            fitting = bisect_right(
                apart, budget, key=lambda each, count=count: self.most(count, each)
            )
            if fitting:
                found.append(Design(count, fitting, self.most(count, fitting)))
        return min(found, key=lambda one: (-one.steps, one.tokens), default=None)

    def _patch(self, sums: list[int], rung: int, each: int) -> int:
        rows = each * self.batch
        return _first(sums, (rung + 1) * rows) - _first(sums, rung * rows)


def _first(sums: list[int], count: int) -> int:
    """Tokens of the first `count` rows, taken again and again."""
    rounds, rest = divmod(count, len(sums) - 1)
    return rounds * sums[-1] + sums[rest]
