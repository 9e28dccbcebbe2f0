"""Regression with a kernel that is there as a matrix: closed forms in float64.

The kernel view of fine-tuning: with a fixed tangent kernel K, gradient descent on squares takes
the outputs to f0(x) + K(x, X) (K(X, X) + ridge)^-1 (y - f0(X)).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Start = tuple[Any, Any]
"""f0, the outputs before training: of the training rows (n,) and of the others (m,)."""
CUTOFF = 1e-6
"""Parts of the kernel this small beside its largest are taken for rounding, as kernels come from
float32 gradients. Ours."""


def regress(
    kernel: Any, across: Any, targets: Any, *, ridge: float = 0.0, start: Start | None = None
) -> Array:
    """Predictions (m,) of kernel ridge regression; of least norm where `ridge` is 0.

    Args:
        kernel: (n, n) among the training rows, symmetric and positive semi-definite.
        across: (n, m) of training rows with the others.
        targets: (n,).
        ridge: Added to the diagonal, in units of the kernel's largest eigenvalue.
        start: Train on `targets - f0` and add f0 back.

    Raises:
        ValueError: Shapes that do not fit, or a negative ridge.
    """
    kernel, across, targets, before, after = _checked(kernel, across, targets, ridge, start)
    values, vectors = np.linalg.eigh((kernel + kernel.T) / 2)
    scales = _scales(values, ridge)
    weights = vectors @ (scales * (vectors.T @ (targets - before)))
    return after + across.T @ weights


def regress_one_sided(
    kernel: Any, across: Any, targets: Any, *, ridge: float = 0.0, start: Start | None = None
) -> Array:
    """Predictions (m,) through an asymmetric kernel, by least squares on its training side.

    For K[i, j] = <sign of row i's gradient, row j's gradient> the steps of SignGD change row j's
    output by K' a. Here a minimises |K' a - r|^2 + d^2 |a|^2 with r = y - f0, and the prediction
    is K(X, x)' a. At d = 0 it interpolates, as `regress_asymmetric` does.

    Args:
        kernel: (n, n), any square matrix.
        across: (n, m) of training rows, signed, with the others.
        targets: (n,).
        ridge: d, in units of the kernel's largest singular value.
        start: As in `regress`.

    Raises:
        ValueError: As `regress`.
    """
    kernel, across, targets, before, after = _checked(kernel, across, targets, ridge, start)
    left, sizes, right = np.linalg.svd(kernel)
    d = ridge * sizes.max(initial=0.0)
    scales = sizes * _inverse(sizes**2 + d**2, CUTOFF**2)
    return after + across.T @ (left @ (scales * (right @ (targets - before))))


def regress_asymmetric(
    kernel: Any,
    across: Any,
    targets: Any,
    *,
    ridge: float = 0.0,
    start: Start | None = None,
    share: float = 1.0,
    flipped: Any = None,
) -> Array:
    """Predictions (m,) of the asymmetric least-squares support vector machine without biases.

    He et al. 2022 (arXiv 2202.01397), as the kernel view of SignGD has it (Malladi et al. 2023):
    [[d I, K], [K', d I]] [a; b] = [r; r] with d = 1 / gamma and r = y - f0, and the prediction
    `share` K(X, x)' a + (1 - `share`) K(x, X) b. For labels of +-1 that is their system in
    alpha_i = a_i / y_i; in a and b it serves any targets. Through K = U S V' it falls into 2 x 2
    systems with eigenvalues d + s and d - s. It is not definite: **where a singular value s is
    near d it is near singular, so that d does not regularise as a ridge does.** At d = 0 it is
    a = K'^-1 r, interpolation. For a symmetric kernel it is ridge regression.

    Args:
        kernel: (n, n), K[i, j] = <sign of row i's gradient, row j's gradient>.
        across: (n, m), training rows signed.
        targets: (n,).
        ridge: d, in units of the kernel's largest singular value.
        start: As in `regress`.
        share: Weight of the prediction through the signed training rows, in [0, 1]; 1 is what
            SignGD itself would predict.
        flipped: (n, m), the other rows signed; needed for a share below 1.

    Raises:
        ValueError: As `regress`.
    """
    kernel, across, targets, before, after = _checked(kernel, across, targets, ridge, start)
    residuals = targets - before
    left, sizes, right = np.linalg.svd(kernel)
    d = ridge * sizes.max(initial=0.0)
    lefts, rights = left.T @ residuals, right @ residuals
    # a + b and a - b in the coordinates of U and V.
    total = _inverse(d + sizes) * (lefts + rights)
    difference = _inverse(d - sizes) * (lefts - rights)
    a, b = left @ (total + difference) / 2, right.T @ (total - difference) / 2
    found = after + share * across.T @ a
    return found if share == 1 else found + (1 - share) * np.asarray(flipped).T @ b


def _scales(values: Array, ridge: float) -> Array:
    """1 / (value + ridge), and 0 for what is zero but for rounding."""
    values = np.maximum(values, 0.0)
    return _inverse(values + ridge * values.max(initial=0.0))


def _inverse(values: Array, cutoff: float = CUTOFF) -> Array:
    large = np.abs(values) > cutoff * np.abs(values).max(initial=0.0)
    return np.divide(1.0, values, out=np.zeros_like(values), where=large)


def _checked(
    kernel: Any, across: Any, targets: Any, ridge: float, start: Start | None
) -> tuple[Array, Array, Array, Any, Any]:
    kernel, across, targets = (np.asarray(x, dtype=np.float64) for x in (kernel, across, targets))
    n = len(targets)
    if kernel.shape != (n, n) or across.shape[:1] != (n,) or across.ndim != 2:
        raise ValueError(
            f"a kernel {kernel.shape}, one across {across.shape} and {n} targets do not fit"
        )
    if ridge < 0:
        raise ValueError(f"ridge = {ridge}: must not be negative")
    before, after = (0.0, 0.0) if start is None else start
    return kernel, across, targets, before, after
