"""The sum of the changes with all its singular values made equal to their mean.

Paper: No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces (Marczak
et al., ICML 2025), Iso-C; arXiv 2502.04959.

Formula: per matrix U S V' = sum_i tau_i; theta = theta_0 + scale * mean(S) U V'. Vectors, stacks of
matrices, embeddings and output layers: theta_0 + scale * mean_i tau_i.

Differs: float32 (float64 where the base is) and rounded once. The authors leave CLIP's embeddings
out of the decomposition; so are a language model's here, and its output layer.

Not covered: Iso-CTS, the variant with task-specific subspaces; weights. The bytes are those of one
LAPACK build at one number of BLAS threads.
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
class IsoC(Streaming):
    """Merges changes to an isotropic one."""

    scale: float = 1.0
    """Factor of the merged change (the authors tune it on validation data)."""

    def work(self, sizes: Sizes) -> Work:
        """The largest matrix of every model at a time for each thread; embeddings go by blocks."""
        from deltaloom.merge._matrices import planned

        return planned(super().work(sizes), sizes, self.threads)

    def rule(self, models: int, seed: int = 0) -> Matrices:
        """See Streaming."""
        from deltaloom.merge._matrices import Matrices

        if models < 1:
            raise InputError("nothing to merge: give at least one delta")
        return Matrices(_isotropic, self.scale)


def _isotropic(changes: np.ndarray) -> np.ndarray:
    """mean(S) U V' (rows, columns) of the sum of changes (k, rows, columns)."""
    import numpy as np

    left, values, right = np.linalg.svd(changes.sum(axis=0), full_matrices=False)
    return (left * values.mean()) @ right
