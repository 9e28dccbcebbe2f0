"""Task singular vectors: each change's largest ones side by side, made orthogonal to one another.

Paper: Task Singular Vectors: Reducing Task Interference in Model Merging (Gargiulo et al., CVPR
2025), TSV-Merge; arXiv 2412.00081.

Formula: per matrix, the first floor(r / T) singular triplets of each of the T changes, r the
smaller side, are put side by side as U, S, V; theta = theta_0 + scale * polar(U) S polar(V)', where
polar(P D Q') = P Q'. Vectors, stacks of matrices, embeddings and output layers: theta_0 + scale *
mean_i tau_i.

Differs: float32 (float64 where the base is) and rounded once. The authors leave CLIP's embeddings
out of the decomposition; so are a language model's here, and its output layer. At least one
triplet of each change stays.

Not covered: TSV-Compress; weights; ranks that differ by change. The bytes are those of one LAPACK
build at one number of BLAS threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from deltaloom.core.errors import InputError
from deltaloom.core.method import Sizes, Work
from deltaloom.merge._streaming import Streaming

if TYPE_CHECKING:
    import numpy as np

    from deltaloom.merge._matrices import Matrices


@final
class Tsv(Streaming):
    """Merges changes by their decorrelated singular vectors."""

    scale: float = 1.0
    """Factor of the merged change (1 in the paper)."""

    def work(self, sizes: Sizes) -> Work:
        """The largest matrix of every model at a time for each thread; embeddings go by blocks."""
        from deltaloom.merge._matrices import planned

        return planned(super().work(sizes), sizes, self.threads)

    def rule(self, models: int, seed: int = 0) -> Matrices:
        """See Streaming."""
        from deltaloom.merge._matrices import Matrices

        if models < 1:
            raise InputError("nothing to merge: give at least one delta")
        return Matrices(_decorrelated, self.scale)


def _decorrelated(changes: np.ndarray) -> np.ndarray:
    """The merged change (rows, columns) of changes (k, rows, columns)."""
    import numpy as np

    kept = max(1, min(changes.shape[1:]) // len(changes))
    parts = []
    for change in changes:
        left, values, right = np.linalg.svd(change, full_matrices=False)
        parts.append((left[:, :kept].copy(), values[:kept], right[:kept].copy()))
    lefts, values, rights = zip(*parts, strict=True)
    left = _polar(np.concatenate(lefts, 1))  # (rows, T kept)
    right = _polar(np.concatenate(rights, 0))  # (T kept, columns)
    return (left * np.concatenate(values)) @ right


def _polar(matrix: np.ndarray) -> np.ndarray:
    """The nearest matrix with orthonormal rows or columns."""
    import numpy as np

    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right
