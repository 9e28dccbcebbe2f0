"""Between the base and the models' mean, as far as the angle between their changes says.

Paper: Model Stock: All we need is just a few fine-tuned models (Jang et al., ECCV 2024);
arXiv 2403.19522.

Formula: theta = t mean_i theta_i + (1 - t) theta_0 with t = N c / (1 + (N - 1) c), c the mean
cosine between pairs of the N changes, per flattened tensor or, with `filter_wise`, per row.

Differs: cosines and sums are float64 and rounded once, and a cosine is that of the vectors however
short they are; mergekit divides by at least 1e-6, which lowers t for short changes (a product of
norms below 1e-6). Where 1 + (N - 1) c vanishes the base stays, as in mergekit.

Not covered: the paper's periodic merging during fine-tuning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from deltaloom.core.errors import InputError
from deltaloom.merge._streaming import Streaming

if TYPE_CHECKING:
    import numpy as np

    from deltaloom.merge._span import Span


@final
class ModelStock(Streaming):
    """Interpolates the base and the mean of two or more models."""

    filter_wise: bool = False
    """One angle per row in place of one per tensor (mergekit's default is off)."""

    def rule(self, models: int, seed: int = 0) -> Span:
        """See Streaming."""
        from deltaloom.merge._span import Span

        if models < 2:
            raise InputError("model_stock needs the angle between changes: give two deltas or more")
        return Span(_weights, "changes", rows=self.filter_wise)


def _weights(gram: np.ndarray, _: str) -> np.ndarray:
    """The weights (rows, k), all equal, of the changes with inner products (rows, k, k)."""
    import numpy as np

    models = gram.shape[1]
    lengths = np.sqrt(np.einsum("rii->ri", gram))
    products = lengths[:, :, None] * lengths[:, None, :]
    cosines = np.clip(gram / np.where(products == 0, 1, products), -1, 1)
    upper = np.triu_indices(models, 1)
    cosine = cosines[:, upper[0], upper[1]].mean(1)
    below = 1 + (models - 1) * cosine
    lost = np.abs(below) < 1e-6
    t = np.where(lost, 0, models * cosine / np.where(lost, 1, below))
    return np.repeat(t[:, None] / models, models, 1)
