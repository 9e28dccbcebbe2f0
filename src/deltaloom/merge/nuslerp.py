"""Spherical interpolation by weights: of two models or their changes, by tensor or by row.

Paper: none; NuSLERP is a method of mergekit (Goddard et al., EMNLP 2024; arXiv 2403.13257) on the
formula of Shoemake (SIGGRAPH 1985).

Formula: as `slerp` at t = w_2 / (w_1 + w_2), between the models or, with origin=base, between
their changes, which are added to the base; with `row_wise` every row has an angle of its own.

Differs: angles and sums are float64 and rounded once. A line replaces the arc where |cos w| is
above 1 - 1e-12, in mergekit where sin^2 w <= 1e-16. `row_wise` takes the last axis, which is
mergekit's `nuslerp_flatten: false` (its `nuslerp_row_wise` takes the first). One delta is merged
with the base where mergekit asks for two.

Not covered: vectors along another axis, weights that differ by layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from deltaloom.core.errors import InputError
from deltaloom.merge._streaming import Streaming, shares, two_ends

if TYPE_CHECKING:
    from deltaloom.merge._span import Span


@final
class NuSlerp(Streaming):
    """Interpolates two models, or two changes, on the sphere."""

    weights: list[float] | None = None
    """One weight for each of the two; equal when not given (ours; mergekit has no default)."""
    origin: Literal["zero", "base"] = "zero"
    """Where the vectors start: zero interpolates the models, base their changes (mergekit: whether
    a base_model is given)."""
    row_wise: bool = False
    """Interpolate row by row in place of the flattened tensor (mergekit flattens by default)."""

    def sources(self, base: Path, deltas: list[Path]) -> list[Path]:
        """The two ends."""
        if self.origin == "zero":
            return two_ends(base, deltas, "nuslerp")
        if len(deltas) != 2:
            raise InputError(f"nuslerp between changes needs two deltas; got {len(deltas)}")
        return deltas

    def rule(self, models: int, seed: int = 0) -> Span:
        """See Streaming."""
        from deltaloom.merge._span import Span, between

        first, second = shares(self.weights, models, normalize=False)
        total = first + second
        t = 0.5 if abs(total) < 1e-6 else second / total
        form = "values" if self.origin == "zero" else "changes"
        return Span(lambda gram, _: between(gram, t, 1 - 1e-12), form, rows=self.row_wise)
