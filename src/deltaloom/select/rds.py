"""Keep the rows whose hidden states are most like the target's (RDS+).

Paper: Ivison et al. 2025, "Large-Scale Data Selection for Instruction Tuning" (arXiv 2503.01807).

Row z of T tokens is embedded as e(z) = sum_i i h_i / (1 + ... + T), with h_i the base's last hidden
state at token i, prompt and response alike; the score of z for target row q is cos(e(z), e(q)).
`pick=round_robin` lets each target row in turn take its most similar unused row, `pick=top` takes
the rows with the largest score for any target row. The score that is stored is that largest one.

Differs: a target row whose most similar row is used takes its next one, where the authors' code
lets the turn pass; embeddings are kept as float16 unit vectors.

Not covered: several tasks with equal shares (the largest score within each task, then round robin
over tasks); another model than the base to embed with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, final

from pydantic import Field

from deltaloom.core.method import Selection, Sizes, Work
from deltaloom.select._budget import BudgetSelector
from deltaloom.select._picking import Pick, by_pick, chosen_for

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.features import Features
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

        assert target is not None
        assert base is not None
        reach = self.reach(len(pool))
        model, tokenizer = base.load(), base.tokenizer()
        rows, queries = (
            self._embedded(name, data, model, tokenizer, base, run)
            for name, data in (("pool", pool), ("target", target))
        )
        influence = rows.scores(queries.matrix())  # (n, t)
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

    def _embedded(
        self, name: str, data: Examples, model: Any, tokenizer: Any, base: Base, run: Run
    ) -> Features:
        """Unit embeddings (n, h), computed shard by missing shard."""
        import numpy as np

        from deltaloom.core.encoding import encode
        from deltaloom.core.features import Features
        from deltaloom.core.progress import progress
        from deltaloom.engine.embed import embedding_width, embeddings
        from deltaloom.engine.meter import count_forward

        limit = min(self.max_length, base.max_length)
        encoded = encode(data, tokenizer, limit)
        cut = sum(row.truncated for row in encoded)
        run.note(**{f"{name}_rows_cut": cut})
        about = {
            "what": f"{name} embeddings",
            "base": base.fingerprint(),
            "pooling": "weighted",
            "max_length": limit,
            "data": data.digest(),
        }
        store = Features.create(
            run.work / "embeddings" / name,
            data.ids,
            embedding_width(model),
            about=about,
            dtype="float16",
        )
        shards, missing = store.shards(), store.missing()
        with progress(about["what"], len(shards), len(shards) - len(missing)) as advance:
            for number in missing:
                part = [encoded[i] for i in shards[number]]
                found = embeddings(model, part, tokenizer.pad_token_id, "weighted")  # (m, h)
                length = np.linalg.norm(found, axis=1, keepdims=True)
                store.write_shard(number, found / np.where(length > 0, length, 1))
                count_forward(run, model, sum(len(row.input_ids) for row in part))
                advance(1)
        return store
