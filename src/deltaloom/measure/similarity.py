"""How alike tasks are by their gradients: before merging or mixing them.

Paper: none; gradient features as in LESS (Xia et al. 2024, arXiv 2402.04333).

Formula (tasks are the rows' `group` where all have one, else their `source`): u_i is row i's loss
gradient, projected and scaled to length 1. Its margin is its mean <u_i, u_j> over its own task's
other rows less the mean over other tasks (each task counting alike); the value is the mean margin:
0 where tasks are no different, `affinity_margin`. With one task it is the affinity within it,
`affinity_own`. `affinity.json` holds the matrix: cosines of the tasks' mean gradients, their
lengths taken from pairs of different rows, with bootstrap intervals over rows.

Items are jackknife pseudo-values, n V - (n - 1) V without the row, since the value is no mean of
rows on their own: their mean is the estimate with its bias removed to first order, their spread
its error, and they pair with those of another model on the same rows.

Differs: a task of one row is refused, not guessed.

Not covered: affinity by training on one task and testing on another; how alike two models are is
`measure cka`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, final

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
    """Affinity of tasks."""

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
        """A pass with gradients over every row."""
        width = min(sizes.row_tokens, self.max_length or sizes.row_tokens)
        tokens = sizes.rows * width
        adapter = self.parameters == "lora"
        return Work(
            adapter_tokens=tokens if adapter else 0.0,
            full_tokens=0.0 if adapter else tokens,
            memory_bytes=sizes.weight_bytes + 4.0 * sizes.rows * self.dimension,
        )

    def measure(self, model: Any, tokenizer: Any, data: Examples, run: Run) -> Estimate:
        """Compare the tasks of `data`; items are pseudo-values by row.

        Raises InputError for too few rows or rows without a response, and WorkError for a gradient
        that is not finite.
        """
        import numpy as np

        from deltaloom.engine.forward import padding_token
        from deltaloom.measure._affinity import affinities, margin_pseudovalues, unit
        from deltaloom.measure._sketches import Gradients

        require_rows(data, "similarity")
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


def _tasks(data: Examples) -> list[str]:
    """Every row's task: its group when all rows have one, else its source."""
    groups = [row.group for row in data]
    named = [name for name in groups if name is not None]
    return named if len(named) == len(groups) else [row.source for row in data]


def _plain(matrix: NDArray[np.float64]) -> list[list[float | None]]:
    """For JSON, which has no NaN."""
    return [[float(x) if x == x else None for x in row] for row in matrix]
