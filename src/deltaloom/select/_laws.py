"""Laws that tell a target's loss from a mixture's shares, and the best shares by them.

- power: L(w) = E + (b . w + b0)^-a with b, b0, a > 0: a power law in effective data, in which every
  source is worth b_j a share; monotone, convex in w.
- loglinear: L(w) = c + exp(k + t . w), the data mixing law of Ye et al. 2024 (arXiv 2403.16952);
  convex in w.
- trees: boosted regression trees, as RegMix's (Liu et al. 2024, arXiv 2407.01492).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize

from deltaloom.core.errors import InputError

if TYPE_CHECKING:
    from deltaloom.select.regress import Kind

Array = NDArray[np.float64]

STARTS = 4
"""Random beginnings of a fit, of which the best counts."""
HOLD = 0.03
"""Weight of the prior that keeps exponents and worths near their middle, against losses scaled to
unit spread: it decides only what the runs leave open (ours)."""
SAMPLES, BEST = 100_000, 128
"""Mixtures tried with trees, and how many of the best are averaged (RegMix)."""


class Law(Protocol):
    """A fitted law of one target."""

    def predict(self, shares: Array) -> Array:
        """Losses (n,) at shares (n, k)."""
        ...


@dataclass(frozen=True)
class Power:
    """E + (b . w + b0)^-a, in units of the runs' spread."""

    floor: float
    exponent: float
    worth: Array
    constant: float
    scale: float

    def predict(self, shares: Array) -> Array:
        """See Law."""
        effective = shares @ self.worth + self.constant
        return self.scale * (self.floor + effective**-self.exponent)

    def gradient(self, w: Array) -> Array:
        """Of the loss at w (k,)."""
        effective = float(w @ self.worth + self.constant)
        return -self.scale * self.exponent * effective ** (-self.exponent - 1) * self.worth


@dataclass(frozen=True)
class LogLinear:
    """c + exp(k + t . w), in units of the runs' spread."""

    floor: float
    height: float
    slopes: Array
    scale: float

    def predict(self, shares: Array) -> Array:
        """See Law."""
        return self.scale * (self.floor + np.exp(self.height + shares @ self.slopes))

    def gradient(self, w: Array) -> Array:
        """Of the loss at w (k,)."""
        return self.scale * float(np.exp(self.height + w @ self.slopes)) * self.slopes


@dataclass(frozen=True)
class Trees:
    """A boosted ensemble."""

    model: Any

    def predict(self, shares: Array) -> Array:
        """See Law."""
        return self.model.predict(shares)


def fit(kind: Kind, shares: Array, losses: Array, seed: int) -> Law:
    """The law of this kind for losses (n,) at shares (n, k)."""
    return {"power": _power, "loglinear": _loglinear, "trees": _trees}[kind](shares, losses, seed)


def best(
    laws: Sequence[Any], caps: Array, starts: Array, rng: np.random.Generator
) -> tuple[Array, float]:
    """Shares (k,) of the least mean loss over targets, none above its cap, and a bound on how much
    better any others could be by the laws.

    Convex laws: the constrained optimum, whose bound is the Frank-Wolfe gap; trees: the mean of the
    best of many random mixtures around `starts`, without a bound (infinite).
    """
    if not all(hasattr(law, "gradient") for law in laws):
        return _sampled(laws, caps, starts, rng), float("inf")

    def value(w: Array) -> float:
        return float(np.mean([law.predict(w[None])[0] for law in laws]))

    def slope(w: Array) -> Array:
        return np.mean([law.gradient(w) for law in laws], axis=0)

    begin = _feasible(starts.mean(0), caps)
    found = minimize(
        value,
        begin,
        jac=slope,
        bounds=[(0.0, float(cap)) for cap in caps],
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    w = _feasible(np.clip(found.x, 0, caps), caps)
    w = _polished(w, caps, value, slope)
    return w, _gap(w, caps, slope)


def cross_validated(kind: Kind, shares: Array, losses: Array, seed: int, folds: int = 5) -> Array:
    """Losses (n,) of runs by laws that were fitted without them."""
    order = np.random.default_rng(seed).permutation(len(losses))
    out = np.empty(len(losses))
    for fold in range(folds):
        held = order[fold::folds]
        rest = np.setdiff1d(order, held)
        out[held] = fit(kind, shares[rest], losses[rest], seed).predict(shares[held])
    return out


def _power(shares: Array, losses: Array, seed: int) -> Power:
    scale = float(losses.std()) or 1.0
    y, k = losses / scale, shares.shape[1]
    low = max(float(y.min()), 1e-9)

    def parts(p: Array) -> tuple[float, float, Array, float]:
        # The floor lies between 0 and the least loss seen. A solver may try any size of step.
        q = np.clip(p, -30, 30)
        exponent = np.exp(min(q[1], 3.0))
        return low / (1 + np.exp(-q[0])), exponent, np.exp(q[2 : 2 + k]), float(np.exp(q[2 + k]))

    def off(p: Array) -> Array:
        floor, exponent, worth, constant = parts(p)
        size = -exponent * np.log(shares @ worth + constant)
        predicted = floor + np.exp(np.clip(size, -50, 50))
        middle = p[2:] - p[2:].mean()
        return np.concatenate([predicted - y, HOLD * middle, HOLD * np.array([p[0], p[1] + 0.7])])

    def slopes(p: Array) -> Array:
        floor, exponent, worth, constant = parts(p)
        effective = shares @ worth + constant
        size = -exponent * np.log(effective)
        above = np.exp(np.clip(size, -50, 50)) * (np.abs(size) < 50)  # what is clipped is flat
        by_part = np.column_stack([shares * worth, np.full(len(y), constant)])
        inner = np.column_stack(
            [
                np.full(len(y), floor * (1 - floor / low)),
                above * size * (p[1] < 3),
                (-exponent * above / effective)[:, None] * by_part,
            ]
        ) * (np.abs(p) < 30)
        middle = np.eye(k + 1) - 1 / (k + 1)
        return np.vstack([inner, HOLD * _after(2, middle), HOLD * np.eye(2, k + 3)])

    # With half of the loss above the floor, effective data of one exponent is (y / 2)^(-1 / a).
    begins = []
    for one in np.random.default_rng(seed).normal(size=(STARTS, k + 3)):
        size = -np.log(max(y.mean() / 2, 1e-9)) / 0.5
        begins.append(one * 0.5 + np.concatenate([[0.0, -0.7], np.full(k + 1, size)]))
    floor, exponent, worth, constant = parts(_least(off, slopes, begins))
    return Power(floor, float(exponent), worth, float(constant), scale)


def _loglinear(shares: Array, losses: Array, seed: int) -> LogLinear:
    scale = float(losses.std()) or 1.0
    y, k = losses / scale, shares.shape[1]
    low = max(float(y.min()), 1e-9)

    def off(p: Array) -> Array:
        floor = low / (1 + np.exp(-np.clip(p[0], -30, 30)))
        predicted = floor + np.exp(np.clip(p[1] + shares @ p[2:], -50, 50))
        return np.concatenate([predicted - y, HOLD * p[2:], [HOLD * p[0]]])

    def slopes(p: Array) -> Array:
        floor = low / (1 + np.exp(-np.clip(p[0], -30, 30)))
        size = p[1] + shares @ p[2:]
        above = np.exp(np.clip(size, -50, 50)) * (np.abs(size) < 50)  # what is clipped is flat
        sloped = floor * (1 - floor / low) * (abs(p[0]) < 30)
        inner = np.column_stack([np.full(len(y), sloped), above, above[:, None] * shares])
        return np.vstack([inner, HOLD * _after(2, np.eye(k)), HOLD * np.eye(1, k + 2)])

    height = np.log(max(y.mean() / 2, 1e-9))
    begins = [
        one * 0.5 + np.concatenate([[0.0, height], np.zeros(k)])
        for one in np.random.default_rng(seed).normal(size=(STARTS, k + 2))
    ]
    p = _least(off, slopes, begins)
    floor = low / (1 + np.exp(-np.clip(p[0], -30, 30)))
    return LogLinear(float(floor), float(p[1]), p[2:], scale)


def _trees(shares: Array, losses: Array, seed: int) -> Trees:
    try:
        from sklearn.ensemble import GradientBoostingRegressor
    except ModuleNotFoundError:
        raise InputError(
            "law = trees needs scikit-learn: pip install 'deltaloom[trees]' (or scikit-learn)"
        ) from None
    model = GradientBoostingRegressor(
        n_estimators=300, learning_rate=0.05, max_depth=3, subsample=0.8, random_state=seed
    )
    return Trees(model.fit(shares, losses))


def _after(columns: int, square: Array) -> Array:
    """A matrix behind so many columns of zeros."""
    return np.hstack([np.zeros((len(square), columns)), square])


def _least(
    off: Callable[[Array], Array], slopes: Callable[[Array], Array], begins: Sequence[Array]
) -> Array:
    found = [least_squares(off, begin, slopes, max_nfev=400) for begin in begins]  # pyright: ignore
    return min(found, key=lambda one: float(one.cost)).x


def _feasible(w: Array, caps: Array) -> Array:
    """The nearest point of the capped simplex: max(0, min(w - tau, cap)) with the sum 1."""
    low, high = float((w - caps).min()) - 1, float(w.max())
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if np.clip(w - tau, 0, caps).sum() > 1 else (low, tau)
    return np.clip(w - (low + high) / 2, 0, caps)


def _vertex(slope: Array, caps: Array) -> Array:
    """The point of the capped simplex where a linear function is least: the best sources first."""
    out, left = np.zeros_like(caps), 1.0
    for j in np.argsort(slope, kind="stable"):
        out[j] = min(left, float(caps[j]))
        left -= out[j]
    return out


def _gap(w: Array, caps: Array, slope: Callable[[Array], Array]) -> float:
    own = slope(w)
    return float(own @ (w - _vertex(own, caps)))


def _polished(
    w: Array, caps: Array, value: Callable[[Array], float], slope: Callable[[Array], Array]
) -> Array:
    """Projected gradient steps, each as long as still helps, from where the solver stopped."""
    length, at = 1.0, value(w)
    for _ in range(2000):
        own = slope(w)
        if own @ (w - _vertex(own, caps)) < 1e-10 * (1 + abs(at)):
            break
        moved = _feasible(w - length * own, caps)
        there = value(moved)
        if there < at:
            w, at, length = moved, there, 2 * length
        else:
            length /= 4
            if length < 1e-12:
                break
    return w


def _sampled(laws: Sequence[Law], caps: Array, starts: Array, rng: np.random.Generator) -> Array:
    """RegMix's: the mean of the best of many random mixtures, here as large as caps allow."""
    middle = starts.mean(0)
    strengths = np.exp(rng.uniform(np.log(1.0), np.log(100.0), SAMPLES))
    gammas = rng.gamma(np.maximum(middle * strengths[:, None], 1e-3))
    shares = gammas / gammas.sum(1, keepdims=True)
    over = (shares > caps).any(1)
    shares = shares[~over] if (~over).sum() >= BEST else np.clip(shares, 0, caps)
    shares /= shares.sum(1, keepdims=True)
    losses = np.mean([law.predict(shares) for law in laws], axis=0)
    return _feasible(shares[np.argsort(losses, kind="stable")[:BEST]].mean(0), caps)
