"""How alike tasks are by their gradients, or two models by their hidden states.

Paper: none for tasks; gradient features as in LESS (Xia et al. 2024, arXiv 2402.04333). Models:
linear CKA, Kornblith et al. 2019 (arXiv 1905.00414), with the unbiased HSIC of Song et al. 2012 as
in Nguyen et al. 2021 (arXiv 2010.15327).

Formula, tasks (the rows' `group` where all have one, else their `source`): u_i is row i's loss
gradient, projected and scaled to length 1. Its margin is its mean <u_i, u_j> over its own task's
other rows less the mean over other tasks (each task counting alike); the value is the mean margin:
0 where tasks are no different, `affinity_margin`. With one task it is the affinity within it,
`affinity_own`. `affinity.json` holds the matrix: cosines of the tasks' mean gradients, their
lengths taken from pairs of different rows, with bootstrap intervals over rows.

Formula, models (`other` is given): CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), K and L the
inner products of the rows' pooled hidden states, HSIC unbiased.

Items are jackknife pseudo-values, n V - (n - 1) V without the row, since neither value is a mean
of rows on their own: their mean is the estimate with its bias removed to first order, their spread
its error, and they pair with those of another model on the same rows.

Differs: nothing is projected to compare hidden states; a task of one row is refused, not guessed.

Not covered: layers below the last; rows in a language that only one of two tokenizers has;
affinity by training on one task and testing on another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field

from deltaloom.core.atomic import write_json
from deltaloom.core.encoding import encode
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate
from deltaloom.core.examples import Examples
from deltaloom.core.method import Measurer, Sizes, Work
from deltaloom.core.run import Run
from deltaloom.measure._items import clusters_of, length_limit, note, require_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@final
class Similarity(Measurer):
    """Affinity of tasks, or alignment with another model."""

    other: str | None = None
    """Model (hub id or folder) whose hidden states are compared with this one's on the same rows;
    None measures the affinity of the rows' tasks."""
    pooling: Literal["mean", "weighted", "last"] = "mean"
    """How a row's hidden states become one vector, for `other` (ours: mean)."""
    parameters: str = "lora"
    """What to differentiate by: all; lora (the B of a fresh adapter on every linear module, A
    random and B zero); bias; or a regular expression searched in the parameters' names. LoRA is
    LESS's choice."""
    r: Annotated[int, Field(ge=1)] = 8
    """Rank of the fresh adapter (PEFT's default: 8)."""
    dimension: Annotated[int, Field(ge=1)] = 4096
    """Width of the projected gradients (LESS: 8192; half of it kept the ranking on CPUs)."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens per row at most; the prompt is cut first. None (ours) is the model's context."""

    def work(self, sizes: Sizes) -> Work:
        """A pass over every row: with gradients, or forward through two models of this size."""
        width = min(sizes.row_tokens, self.max_length or sizes.row_tokens)
        tokens = sizes.rows * width
        if self.other is not None:
            return Work(forward_tokens=2 * tokens, memory_bytes=2 * sizes.weight_bytes)
        adapter = self.parameters == "lora"
        return Work(
            adapter_tokens=tokens if adapter else 0.0,
            full_tokens=0.0 if adapter else tokens,
            memory_bytes=sizes.weight_bytes + 4.0 * sizes.rows * self.dimension,
        )

    def measure(self, model: Any, tokenizer: Any, data: Examples, run: Run) -> Estimate:
        """Compare the rows of `data`; items are pseudo-values by row.

        Raises InputError for too few rows, rows without a response, or an `other` that is no
        model, and WorkError for a gradient that is not finite.
        """
        require_rows(data, "similarity")
        if self.other is None:
            return self._affinity(model, tokenizer, data, run)
        return self._alignment(model, tokenizer, data, run)

    def _affinity(self, model: Any, tokenizer: Any, data: Examples, run: Run) -> Estimate:
        import numpy as np

        from deltaloom.engine.forward import padding_token
        from deltaloom.measure._affinity import affinities, margin_pseudovalues, unit
        from deltaloom.measure._sketches import Gradients

        names = _tasks(data)
        kinds = sorted(set(names))
        for name in kinds:
            if names.count(name) < 3:
                raise InputError(
                    f"measure similarity: task {name!r} of {data.name} has {names.count(name)} "
                    "row(s) and needs 3; add rows or leave it out"
                )
        tasks = np.array([kinds.index(name) for name in names])  # (n,)
        encoded = encode(data, tokenizer, length_limit(self.max_length, model))
        work = Gradients(
            encoded, padding_token(tokenizer), run.origin,
            self.parameters, self.r, self.dimension, run.seed,
        )  # fmt: skip
        gradients, cost = work.matrix_of(model, data, run)
        rows = unit(gradients)
        gram = rows @ rows.T  # (n, n)
        matrix, low, high = affinities(gram, tasks, run.seed)
        written = {"affinity": matrix, "low": low, "high": high}
        write_json(
            run.folder / "affinity.json",
            {"tasks": kinds, **{key: _plain(values) for key, values in written.items()}},
        )
        note(run, tasks=len(kinds))
        return Estimate.from_items(
            dict(zip(data.ids, margin_pseudovalues(gram, tasks).tolist(), strict=True)),
            metric="affinity_margin" if len(kinds) > 1 else "affinity_own",
            clusters=clusters_of(data),
            cost=cost,
        )

    def _alignment(self, model: Any, tokenizer: Any, data: Examples, run: Run) -> Estimate:
        import numpy as np

        from deltaloom.core.base import Base
        from deltaloom.core.origin import Origin
        from deltaloom.engine.forward import device_of, padding_token
        from deltaloom.measure._cka import cka, cka_pseudovalues
        from deltaloom.measure._sketches import States

        if len(data) < 5:
            raise InputError(
                f"measure similarity: {data.name} holds {len(data)} row(s) and `other` needs 5"
            )
        other = Base(model=str(self.other), device=str(device_of(model)))
        theirs = Origin(other)
        pairs = {
            "measured": (model, tokenizer, run.origin),
            other.fingerprint(): (*theirs.load(), theirs),
        }
        sides = []
        for whose, (one, words, origin) in pairs.items():
            rows = encode(data, words, length_limit(self.max_length, one))
            work = States(rows, padding_token(words), origin, self.pooling)
            sides.append(work.matrix_of(one, data, whose, run))
        states, costs = zip(*sides, strict=True)
        value = cka(*states)
        if np.isnan(value):
            raise InputError(
                f"measure similarity: the hidden states of all rows of {data.name} are the same "
                "in one of the models; give other rows"
            )
        facts: dict[str, Any] = {"cka": value}
        note(run, **facts)
        return Estimate.from_items(
            dict(zip(data.ids, cka_pseudovalues(*states).tolist(), strict=True)),
            metric="cka",
            clusters=clusters_of(data),
            cost={key: sum(cost[key] for cost in costs) for key in costs[0]},
        )


def _tasks(data: Examples) -> list[str]:
    """Every row's task: its group when all rows have one, else its source."""
    groups = [row.group for row in data]
    named = [name for name in groups if name is not None]
    return named if len(named) == len(groups) else [row.source for row in data]


def _plain(matrix: NDArray[np.float64]) -> list[list[float | None]]:
    """For JSON, which has no NaN."""
    return [[float(x) if x == x else None for x in row] for row in matrix]
