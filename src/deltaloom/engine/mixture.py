"""Two Gaussians fitted to numbers by expectation-maximisation: low losses apart from high ones.

The density is `w_1 N(x; m_1, v_1) + w_2 N(x; m_2, v_2)` with `m_1 <= m_2`. The fit is that of
scikit-learn's `GaussianMixture(n_components=2)` in one dimension, with its defaults: it starts from
2-means (the best split, found exactly, where scikit-learn's may be a local one), adds 1e-6 to the
variances, and stops when the mean log-likelihood gains less than 1e-3 or after 100 rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

FLOOR = 1e-6
"""Added to every variance (scikit-learn's `reg_covar`)."""
GAIN = 1e-3
"""A round that gains less mean log-likelihood is the last (scikit-learn's `tol`)."""
ROUNDS = 100
"""Rounds at most (scikit-learn's `max_iter`)."""


@dataclass(frozen=True)
class Mixture:
    """Two components, the lower mean first; every array is (2,)."""

    weights: NDArray[np.float64]
    means: NDArray[np.float64]
    variances: NDArray[np.float64]

    def log_joint(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """`log w_k + log N(x; m_k, v_k)` of every value, (n, 2)."""
        squares = (values[:, None] - self.means) ** 2 / self.variances
        with np.errstate(divide="ignore"):  # a component that lost all its weight
            return np.log(self.weights) - 0.5 * (np.log(2 * np.pi * self.variances) + squares)

    def shares(self, values: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        """Probability of each component given each value, (n, 2), and the mean log-likelihood."""
        joint = self.log_joint(values)
        total = np.logaddexp(joint[:, 0], joint[:, 1])
        return np.exp(joint - total[:, None]), float(total.mean())


def lower_component(values: ArrayLike) -> NDArray[np.float64]:
    """Probability (n,) that each of `values` (n,) is of the component with the lower mean.

    Values that do not differ are all of it.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < 2 or numbers.min() == numbers.max():
        return np.ones(len(numbers))
    return np.ascontiguousarray(fit_two(numbers).shares(numbers)[0][:, 0])


def fit_two(values: NDArray[np.float64]) -> Mixture:
    """The mixture of `values` (n,), which hold at least two different numbers."""
    low = values <= _best_split(values)
    shares = np.stack([low, ~low], axis=1).astype(np.float64)  # (n, 2)
    mixture, before = _maximised(values, shares), -np.inf
    for _ in range(ROUNDS):
        shares, likelihood = mixture.shares(values)
        mixture = _maximised(values, shares)
        if abs(likelihood - before) < GAIN:
            break
        before = likelihood
    order = np.argsort(mixture.means, kind="stable")
    return Mixture(mixture.weights[order], mixture.means[order], mixture.variances[order])


def _maximised(values: NDArray[np.float64], shares: NDArray[np.float64]) -> Mixture:
    counts = shares.sum(0) + 10 * np.finfo(np.float64).eps
    means = shares.T @ values / counts
    squares = (values[:, None] - means) ** 2
    return Mixture(counts / counts.sum(), means, (shares * squares).sum(0) / counts + FLOOR)


def _best_split(values: NDArray[np.float64]) -> float:
    """The largest value of the lower group in the split with the least squares within."""
    ordered = np.sort(values)
    centred = ordered - ordered.mean()
    below = np.cumsum(centred)[:-1]
    sizes = np.arange(1, len(ordered))
    # Least squares within is most between: the sum of (group sum)^2 / size, and both sums are
    # equal but for their sign.
    between = below**2 * (1 / sizes + 1 / (len(ordered) - sizes))
    between[ordered[:-1] == ordered[1:]] = -np.inf  # equal values stay together
    return float(ordered[int(np.argmax(between))])
