"""Which candidate goes on by one part: expected improvement there over the predicted cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import erfcx, log_ndtr

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def log_improvement(mean: Array, deviation: Array, best: Array) -> Array:
    """log E[max(0, best - y)] for y of these normal distributions, stable where it is tiny.

    With u = (best - mean) / deviation it is log deviation + log(phi(u) + u Phi(u)).
    """
    u = (best - mean) / deviation
    near = np.maximum(u, -1.0)
    direct = np.log(np.exp(-(near**2) / 2) / math.sqrt(2 * math.pi) + near * np.exp(log_ndtr(near)))
    far = np.minimum(u, -1.0)
    mills = math.sqrt(math.pi / 2) * erfcx(-far / math.sqrt(2))
    # 1 - |u| mills -> 1 / u^2, of which nothing is left of the difference far out.
    rest = np.where(far > -1e3, np.log(np.maximum(1 + far * mills, 1e-300)), -2 * np.log(-far))
    tail = -(far**2) / 2 - math.log(2 * math.pi) / 2 + rest
    return np.log(deviation) + np.where(u > -1.0, direct, tail)


class Costs:
    """log cost of a part = w . (1, log of what is positive, choices): ridge around a guess.

    Without any observation a part costs in proportion to the tokens and the passes.
    """

    def __init__(self, names: Sequence[str], guess: dict[str, float]) -> None:
        """`names` of the coordinates; `guess` their coefficients before anything is seen."""
        self.prior = np.array([0.0, *(guess.get(name, 0.0) for name in names)])

    def predict(self, seen: Array, costs: Array, wanted: Array) -> Array:
        """Costs at `wanted` (n, d) after costs (k,) at `seen` (k, d)."""
        if not len(costs):
            return np.exp(np.c_[np.ones(len(wanted)), wanted] @ self.prior)
        middle = seen.mean(0)
        design = np.c_[np.ones(len(seen)), seen - middle]
        logs = np.log(np.maximum(costs, 1e-12))
        away = logs - design @ self.prior
        # The level is free; slopes stay near the guess unless the data say otherwise (ours: a
        # slope's prior deviation is 1, the noise's 0.1).
        ridge = np.diag([1e-6, *[0.01] * seen.shape[1]])
        slopes = self.prior + np.linalg.solve(design.T @ design + ridge, design.T @ away)
        return np.exp(np.c_[np.ones(len(wanted)), wanted - middle] @ slopes)
