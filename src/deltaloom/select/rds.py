"""Keep the rows whose hidden states are most like the target's (RDS+).

Paper: Ivison et al. 2025, "Large-Scale Data Selection for Instruction Tuning" (arXiv 2503.01807).

Row z of T tokens is embedded as e(z) = sum_i i h_i / (1 + ... + T), with h_i the base's last hidden
state at token i, prompt and response alike; the score of z for target row q is cos(e(z), e(q)).
`pick=round_robin` lets each target row in turn take its most similar unused row, `pick=top` takes
the rows with the largest score for any target row. The score that is stored is that largest one.

Differs: a target row whose most similar row is used takes its next one, where the authors' code
lets the turn pass.

Not covered: several tasks with equal shares (the largest score within each task, then round robin
over tasks); another model than the base to embed with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, final

from pydantic import Field

from deltaloom.core.method import Selection, Sizes, Work
from deltaloom.select._budget import BudgetSelector
from deltaloom.select._picking import Pick, by_pick, chosen_for

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run


@final
class Rds(BudgetSelector):
    """Similarity of hidden states to the target's."""

    needs: ClassVar[frozenset[str]] = frozenset({"target", "base"})

    pick: Pick = "round_robin"
    """How scores become a choice: round_robin (the authors' for one task) or top."""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Tokens per row that are read, at most (the authors': 2048); never more than the base's
    context."""

    def work(self, sizes: Sizes) -> Work:
        """One forward pass over pool and target."""
        return Work(
            forward_tokens=(sizes.rows + sizes.target_rows) * sizes.row_tokens,
            memory_bytes=sizes.weight_bytes,
        )

    def select(
        self, pool: Examples, run: Run, *, target: Examples | None, base: Base | None
    ) -> Selection:
        """Rows in order of choice; the scores cover the whole pool."""
        from deltaloom.core.features import Features
        from deltaloom.engine.similarity import unit_rows
        from deltaloom.select._embedding import embedded

        assert target is not None
        assert base is not None
        reach = self.reach(len(pool))
        rows, queries = (
            unit_rows(embedded(name, data, base, run, "weighted", self.max_length).matrix())
            for name, data in (("pool", pool), ("target", target))
        )
        influence = rows @ queries.T  # (n, t)
        order, wanted = by_pick(self.pick, influence, reach)
        chosen = self.take(pool, order, run, base)
        scores = Features.from_scores(
            run.work / "scores",
            pool.ids,
            influence.max(axis=1),
            about={"method": "rds", "base": base.fingerprint(), "target": target.digest()},
            columns={"source": [row.source for row in pool]},
        )
        number = {identity: row for row, identity in enumerate(pool.ids)}
        reasons = {
            identity: f"cosine {influence[number[identity], query]:.3f} "
            f"with target row {target[query].id}"
            for identity, query in chosen_for(chosen, pool, order, wanted).items()
        }
        return Selection(chosen, scores, reasons)
