"""The direction of a weighted sum of unit vectors, at the mean of their lengths: many models' arc.

Paper: none; a method of mergekit described by its author (Goddard, "Multi-SLERP",
goddard.blog/posts/multislerp-wow-what-a-cool-idea).

Formula: theta = (sum_i w_i |x_i|) m / |m| with m = sum_i w_i x_i / |x_i|, the weights summing to 1.
mergekit states it as a barycentre in the tangent space at m / |m|, but that step is empty:
sum_i w_i (u_i - (u_i . m') m') = m - |m| m' = 0 for m' = m / |m|.

Differs: inner products and sums are float64 and rounded once; weights are equal when not given. Two
models that cancel are interpolated in a straight line, as in mergekit.

Not covered: weights that differ by layer; the true mean on the sphere, which is `karcher`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, final

from deltaloom.core.errors import WorkError
from deltaloom.merge._streaming import Streaming, shares

if TYPE_CHECKING:
    import numpy as np

    from deltaloom.merge._span import Span


@final
class MultiSlerp(Streaming):
    """Averages the directions of models, or of changes, and their lengths, apart."""

    weights: list[float] | None = None
    """One weight per delta, in their order; all 1 when not given (mergekit: no default)."""
    normalize: bool = True
    """Divide the weights by their sum (mergekit's `normalize_weights`)."""
    origin: Literal["zero", "base"] = "zero"
    """Where the vectors start: zero averages the models, base their changes (mergekit: whether a
    base_model is given)."""

    def rule(self, models: int, seed: int = 0) -> Span:
        """See Streaming."""
        from functools import partial

        from deltaloom.merge._span import Span

        parts = shares(self.weights, models, self.normalize)
        form = "values" if self.origin == "zero" else "changes"
        return Span(partial(_weights, parts), form)


def _weights(parts: list[float], gram: np.ndarray, name: str) -> np.ndarray:
    """The weights (1, k) of the sources in the result, from their inner products (1, k, k)."""
    import numpy as np

    if len(parts) == 1:
        return np.ones((1, 1))
    lengths = np.sqrt(gram[0].diagonal())
    units = np.array(parts) / np.where(lengths == 0, 1, lengths)
    square = max(units @ gram[0] @ units, 0.0)
    if lengths.any() and square < 1e-16:
        if len(parts) == 2:
            return np.array([parts])
        raise WorkError(
            f"tensor {name!r}: the directions of the models cancel at these weights, so they have "
            "no mean; choose other weights"
        )
    return (units * (lengths @ parts) / (np.sqrt(square) or 1.0))[None]
