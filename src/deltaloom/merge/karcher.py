"""The Riemannian (Karcher) mean of the models' directions, at the mean of their lengths.

Paper: Riemannian Center of Mass and Mollifier Smoothing (Karcher, Comm. Pure Appl. Math. 1977), as
a merge in mergekit; arXiv 2603.04972.

Formula: u <- exp_u(sum_i w_i log_u(x_i / |x_i|)) on the unit sphere, from the normalized Euclidean
mean, until the step is shorter than `tol`; theta = (sum_i w_i |x_i|) u, per flattened tensor.

Differs: the iteration runs on the k x k inner products of the models in float64, so tensors are
read twice whatever the number of steps, and rounded once. Weights count, which mergekit ignores.
Models with a tensor of zeros have no direction there and count by length only; mergekit treats
lengths up to `tol` so and writes zeros when all are that short. A model opposite to the mean has no
direction from it and is passed over in that step.

Not covered: changes over the base, weights that differ by layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from pydantic import Field

from deltaloom.merge._streaming import Streaming, shares

if TYPE_CHECKING:
    import numpy as np

    from deltaloom.merge._span import Span


@final
class Karcher(Streaming):
    """Averages models on the sphere."""

    weights: list[float] | None = None
    """One weight per delta, in their order; all 1 when not given."""
    max_iter: int = Field(10, ge=0)
    """Steps at most (mergekit's default)."""
    tol: float = Field(1e-5, gt=0)
    """Length of a step, in radians, that ends the iteration (mergekit's default)."""

    def rule(self, models: int, seed: int = 0) -> Span:
        """See Streaming."""
        from deltaloom.merge._span import Span

        parts = shares(self.weights, models, normalize=True)
        return Span(lambda gram, _: self._weights(gram[0], parts)[None])

    def _weights(self, gram: np.ndarray, parts: list[float]) -> np.ndarray:
        """The weights (k,) of the models in their mean, from their inner products (k, k)."""
        import numpy as np

        lengths = np.sqrt(gram.diagonal())
        pulls = np.where(lengths == 0, 0, parts)
        if len(parts) == 1 or not pulls.any():
            return np.array(parts)
        pulls = pulls / pulls.sum()
        divisors = np.where(lengths == 0, 1, lengths)
        cosines = gram / np.outer(divisors, divisors)
        mean = pulls  # a point as its weights of the unit vectors
        if (length := np.sqrt(max(mean @ cosines @ mean, 0.0))) < self.tol:
            mean, length = np.eye(len(parts))[int(pulls.nonzero()[0][0])], 1.0
        mean = mean / length
        for _ in range(self.max_iter):
            cosine = np.clip(cosines @ mean, -1, 1)
            angle = np.arccos(cosine)
            # x / sin x; at 0 it is 1, and at pi there is no direction
            stretch = np.where(angle < 1e-7, 1.0, angle / np.maximum(np.sin(angle), 1e-300))
            pull = np.where(np.pi - angle < 1e-7, 0.0, pulls * stretch)
            step = pull - (pull @ cosine) * mean
            size = np.sqrt(max(step @ cosines @ step, 0.0))
            if size < self.tol:
                break
            mean = np.cos(size) * mean + np.sin(size) / size * step
            mean = mean / np.sqrt(mean @ cosines @ mean)
        return (lengths @ parts) * mean / divisors
