"""Which sources are like the target, when only a proxy of it was seen: conjugate Gaussian.

Sources g have data y_g = X_g theta + W_g psi_g + noise: theta is shared, psi_g each source's own.
Of the target's psi only a proxy is known, z ~ N(psi, R). A source is like the target (s_g = 1, with
prior probability `share`) when its psi_g ~ N(psi, near), else its psi_g is from the prior N(0, V).

Given all s everything is Gaussian: p(y | s, z) and the posterior of (theta, psi) are closed forms.
The relevance of a source is p(s_g = 1 | y, z): a sum over all s for few sources, for more a Gibbs
sample of s (each s_g from its conditional, theta and psi integrated out). A sample does not leave a
group of sources that agree, so it begins with their likelihoods to a small power, which grows to 1:
then it is the proxy that says which group. The robust posterior has each source's likelihood to the
power of its relevance:

    p(theta, psi | y, z) ~ p(theta) p(psi | z) prod_g p(y_g | theta, psi)^r_g
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SUMMED = 10
"""Sources up to which all 2^G patterns are summed (ours)."""
COOLEST = 1e-4
"""Power of the likelihoods in a sample's first sweep (ours)."""


@dataclass(frozen=True)
class Source:
    """One source's data: shared (n, p), own (n, q), values (n,)."""

    shared: Array
    own: Array
    values: Array


@dataclass(frozen=True)
class Model:
    """What is known before the sources are seen."""

    shared: float
    """Prior variance of each of theta."""
    own: Array
    """V (q, q), prior covariance of a source's psi."""
    proxy: Array
    """z (q,)."""
    proxy_noise: Array
    """R (q, q)."""
    noise: float
    """Variance of a value."""
    share: float = 0.5
    """Prior probability that a source is like the target."""
    near: Array | None = None
    """Covariance (q, q) of a like source's psi around the target's; None for the same psi."""

    def target(self) -> tuple[Array, Array]:
        """Mean and covariance of the target's psi given the proxy alone."""
        gain = self.own @ np.linalg.inv(self.own + self.proxy_noise)
        return gain @ self.proxy, self.own - gain @ self.own


class Evidence:
    """log p(y | s, z) of patterns s, from each source's sufficient statistics."""

    def __init__(self, model: Model, sources: Sequence[Source]) -> None:
        self.model = model
        p = sources[0].shared.shape[1]
        mean, covariance = model.target()
        prior = np.zeros((p + len(mean), p + len(mean)))
        prior[:p, :p] = np.eye(p) / model.shared
        prior[p:, p:] = np.linalg.inv(covariance)
        self.prior = prior
        self.shift = np.r_[np.zeros(p), prior[p:, p:] @ mean]
        found = [[self._part(one, like) for like in (False, True)] for one in sources]
        self.precisions, self.shifts, self.constants = (
            np.array([[part[k] for part in parts] for parts in found]) for k in range(3)
        )
        """Of each source, unlike and like: (G, 2, ...)."""

    def _part(self, one: Source, like: bool) -> tuple[Array, Array, float]:
        """Precision and shift that a source adds on (theta, psi), and its log density's rest."""
        noise = self.model.noise * np.eye(len(one.values))
        if like:
            design, covariance = np.c_[one.shared, one.own], noise
            if self.model.near is not None:
                covariance = noise + one.own @ self.model.near @ one.own.T
        else:
            design = np.c_[one.shared, np.zeros_like(one.own)]
            covariance = noise + one.own @ self.model.own @ one.own.T
        solved = np.linalg.solve(covariance, np.c_[design, one.values])
        constant = -0.5 * float(one.values @ solved[:, -1] + np.linalg.slogdet(covariance)[1])
        return design.T @ solved[:, :-1], design.T @ solved[:, -1], constant

    def log(self, pattern: Sequence[int] | Array, power: float = 1.0) -> float:
        """log p(y, s | z), up to what no pattern changes, with the likelihoods to a power."""
        rows, columns = np.arange(len(pattern)), np.asarray(pattern)
        precision = self.prior + power * self.precisions[rows, columns].sum(0)
        shift = self.shift + power * self.shifts[rows, columns].sum(0)
        share = self.model.share
        odds = np.log(np.where(columns, share, 1 - share)).sum()
        fit = 0.5 * float(shift @ np.linalg.solve(precision, shift))
        constant = power * float(self.constants[rows, columns].sum())
        return constant + fit - 0.5 * float(np.linalg.slogdet(precision)[1]) + float(odds)

    def weighted(self, weights: Sequence[float] | Array) -> tuple[Array, Array]:
        """Mean and covariance of (theta, psi), each source's likelihood to a power."""
        powers = np.asarray(weights)
        precision = self.prior + np.tensordot(powers, self.precisions[:, 1], 1)
        shift = self.shift + powers @ self.shifts[:, 1]
        covariance = np.linalg.inv(precision)
        return covariance @ shift, covariance  # pyright: ignore[reportReturnType]


def relevance(evidence: Evidence, seed: int = 0, sweeps: int = 400, summed: int = SUMMED) -> Array:
    """p(s_g = 1 | y, z) of each source, (G,); the first quarter of a sample's sweeps is dropped."""
    count = len(evidence.constants)
    if count <= summed:
        patterns = list(itertools.product((0, 1), repeat=count))
        logs = np.array([evidence.log(one) for one in patterns])
        chance = np.exp(logs - logs.max())
        return chance @ np.array(patterns, dtype=float) / chance.sum()
    draw = np.random.default_rng(seed)
    pattern = (draw.random(count) < evidence.model.share).astype(int)
    early = sweeps // 4
    total = np.zeros(count)
    for sweep in range(sweeps):
        power = COOLEST ** max(0.0, 1 - (sweep + 1) / early)
        now = evidence.log(pattern, power)
        for g in range(count):
            pattern[g] = 1 - pattern[g]
            other = evidence.log(pattern, power)
            chance = 1 / (1 + np.exp(np.clip(now - other, -700, 700)))  # of the flip
            if sweep >= early:
                total[g] += chance if pattern[g] else 1 - chance
            if draw.random() < chance:
                now = other
            else:
                pattern[g] = 1 - pattern[g]
    return total / (sweeps - early)
