"""Keep a uniformly random part of the pool: the baseline every selection must beat.

Paper: none.

Every subset of the budget's size is equally likely; the seed decides which.

Differs: nothing.

Not covered: stratified or weighted sampling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from deltaloom.core.method import Selection, Sizes, Work
from deltaloom.select._budget import BudgetSelector

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run


@final
class Random(BudgetSelector):
    """Uniform sampling without replacement."""

    def work(self, sizes: Sizes) -> Work:
        """No model is run."""
        return Work()

    def select(
        self, pool: Examples, run: Run, *, target: Examples | None = None, base: Base | None = None
    ) -> Selection:
        """Rows in the random order of their choice."""
        order = draw(len(pool), self.reach(len(pool)), run.seed)
        return Selection(self.take(pool, order, run, base))


def draw(rows: int, count: int, seed: int | tuple[int, ...]) -> list[int]:
    """`count` of `rows` row numbers, uniformly without replacement."""
    import numpy as np

    return np.random.default_rng(seed).permutation(rows)[:count].tolist()
