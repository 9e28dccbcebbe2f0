"""Keep the rows that, shown as examples, help the base most with the rest of the pool (DELIFT).

Paper: Agarwal et al. 2025, "DELIFT: Data Efficient Language model Instruction Fine Tuning"
(arXiv 2411.04425).

Utility of row j for row i: UF_ij = d(y_i, p(.|x_i)) - d(y_i, p(.|x_j, y_j, x_i)), where
d = || p - 1 ||_2 / sqrt(T_i) over the probabilities p of the T_i tokens of answer i, each given the
true tokens before it. A set A is then chosen greedily for the stage of tuning:
instruction tuning (neither `target` nor `given`): sum_i max_{j in A} UF_ij;
task-specific (`target`): sum_i min(max_{j in A} UF_ij, eta max_{q in target} UF_iq);
continual (`given`): sum_i max(max_{j in A} UF_ij - nu max_{p in given} UF_ip, 0).
The score of a row is the value of that row alone.

Differs: each row is asked with its `neighbours` nearest rows only (cosine of mean hidden states,
less the pool's mean), which costs n k pairs where the paper's form (`neighbours=null`) costs n^2;
other pairs count as no gain, and so, with `scaling=clip`, do pairs that harm (`scaling=minmax` is
the authors' scaling of the whole matrix to [0, 1]). A row is its own nearest neighbour. Pairs
longer than the context count as no gain and are counted in the run's notes (`pairs_too_long`).
Where the tokenizer has a chat template, the example is an earlier turn (its system message is left
out); else prompts have the authors' layout. End marks are not scored.

Not covered: the authors' exponential variant; sharing the passes over an example between the rows
that it is shown to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

from pydantic import Field, model_validator

from deltaloom.core.errors import InputError
from deltaloom.core.method import Selection, Sizes, Work
from deltaloom.core.places import PLACE
from deltaloom.select._budget import BudgetSelector

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.engine.similarity import Kernel


@final
class Delift(BudgetSelector):
    """Pairwise in-context utility, covered greedily."""

    needs: ClassVar[frozenset[str]] = frozenset({"base"})

    neighbours: Annotated[int | None, Field(ge=1)] = 16
    """Examples that each row is asked with, its nearest of pool, target and given each; null asks
    it with all of them, as the paper does (ours: 16)."""
    given: Annotated[str | None, PLACE] = None
    """Rows that the base has been tuned on: file, folder or dataset id. What they help with already
    is not chosen for again (the paper's continual stage)."""
    eta: Annotated[float, Field(ge=0)] = 1.0
    """How far beyond the target's own help a row's help counts (submodlib's default, which the
    authors use: 1)."""
    nu: Annotated[float, Field(ge=0)] = 1.0
    """How strictly what `given` helps with is left out (submodlib's default, which the authors
    use: 1)."""
    scaling: Literal["clip", "minmax"] = "clip"
    """How utilities become similarities: clip counts harm as no gain (ours), minmax maps the
    smallest to 0 and the largest to 1 (the authors') and needs neighbours=null."""
    max_length: Annotated[int | None, Field(ge=2)] = None
    """Tokens of example and row together, at most; null is the base's context. Longer pairs count
    as no gain."""

    @model_validator(mode="after")
    def _whole_for_minmax(self) -> Delift:
        if self.scaling == "minmax" and self.neighbours is not None:
            raise ValueError("scaling=minmax needs neighbours=null: it scales all pairs")
        return self

    def work(self, sizes: Sizes) -> Work:
        """A pass per pair of about two rows' tokens, one per row alone, one to find neighbours."""
        groups = [count for count in (sizes.rows, sizes.target_rows) if count]
        shown = sum(min(self.neighbours or count, count) for count in groups)
        alone = len(groups) * sizes.rows + (sum(groups) if self.neighbours else 0)
        entries = 4.0 * sizes.rows * shown
        return Work(
            forward_tokens=(2 * sizes.rows * shown + alone) * sizes.row_tokens,
            memory_bytes=sizes.weight_bytes + 6 * entries,
            disk_bytes=entries,
        )

    def select(
        self, pool: Examples, run: Run, *, target: Examples | None, base: Base | None
    ) -> Selection:
        """Rows in order of choice; the scores cover the whole pool."""
        from deltaloom.core.examples import Examples
        from deltaloom.core.features import Features
        from deltaloom.engine import submodular
        from deltaloom.select._utility import question_and_answer

        assert base is not None
        if target is not None and self.given is not None:
            raise InputError(
                "delift: target= asks for the task-specific stage and given= for the continual "
                "one; leave out one of them"
            )
        budget = self.reach(len(pool))
        known = Examples.read(self.given) if self.given is not None else None
        others = {"target": target, "given": known}
        groups = {"pool": pool, **{name: rows for name, rows in others.items() if rows is not None}}
        for row in (row for rows in groups.values() for row in rows):
            question_and_answer(row)  # before any pass over the rows
        kernels = self._kernels(groups, base, run)
        if target is not None:
            picks = submodular.mutual_information(
                kernels["pool"], budget, kernels["target"], self.eta
            )
        elif known is not None:
            picks = submodular.conditional_gain(kernels["pool"], budget, kernels["given"], self.nu)
        else:
            picks = submodular.facility_location(kernels["pool"], budget)
        chosen = self.take(pool, picks.indices, run, base)
        scores = Features.from_scores(
            run.work / "scores",
            pool.ids,
            picks.alone,
            about={
                "method": "delift",
                "base": base.fingerprint(),
                **{name: rows.digest() for name, rows in groups.items()},
            },
            columns={"source": [row.source for row in pool]},
        )
        gains = dict(zip((pool.ids[int(i)] for i in picks.indices), picks.gains, strict=True))
        reasons = {row.id: f"adds {gains[row.id]:.4g} to the utility covered" for row in chosen}
        return Selection(chosen, scores, reasons)

    def _kernels(self, groups: dict[str, Examples], base: Base, run: Run) -> dict[str, Kernel]:
        """For pool, and target or given: the utilities of its rows for the pool's, as a kernel."""
        import numpy as np

        from deltaloom.select._utility import utilities

        limit = min(self.max_length or base.max_length, base.max_length)
        pool, found = groups["pool"], {}
        unfit = pairs = 0
        for name, places in self._places(groups, base, run).items():
            gains, too_long = utilities(
                run.work / "utilities" / name, pool, groups[name], places, limit, base, run,
                f"{name} utilities",
            )  # fmt: skip
            found[name] = _kernel(gains, places, len(groups[name]), self.scaling)
            pairs, unfit = pairs + places.size, unfit + too_long
            run.note(**{f"mean_{name}_utility": float(np.mean(gains))})
        run.note(pairs=pairs, pairs_too_long=unfit)
        if unfit == pairs:
            raise InputError(
                f"delift: none of the {pairs} pairs fits {limit} tokens; give shorter rows"
            )
        return found

    def _places(self, groups: dict[str, Examples], base: Base, run: Run) -> dict[str, NDArray[Any]]:
        """For each group, the numbers (n, k) of its rows that the pool's are asked with."""
        import numpy as np

        rows = len(groups["pool"])
        if self.neighbours is None:
            return {
                name: np.broadcast_to(np.arange(len(group)), (rows, len(group)))
                for name, group in groups.items()
            }
        from deltaloom.engine.similarity import neighbours_of, unit_rows
        from deltaloom.select._embedding import centred

        states = centred(groups, base, run)
        units = {name: unit_rows(each, "hidden states") for name, each in states.items()}
        return {
            name: neighbours_of(units["pool"], each, min(self.neighbours, len(each)))[0]
            for name, each in units.items()
        }


def _kernel(gains: np.ndarray, places: np.ndarray, candidates: int, scaling: str) -> Any:
    """A kernel of `candidates` rows and n columns from utilities (n, k) of the rows `places`."""
    import numpy as np
    from scipy import sparse

    from deltaloom.engine.similarity import Dense, Sparse

    if scaling == "minmax":
        low, high = gains.min(), gains.max()
        return Dense.of((gains.T - low) / max(high - low, np.finfo(np.float32).tiny), "utilities")
    n, k = gains.shape
    parts = (np.maximum(gains, 0).reshape(-1), places.reshape(-1), np.arange(n + 1) * k)
    return Sparse.of(sparse.csr_matrix(parts, shape=(n, candidates)).T, "utilities")
