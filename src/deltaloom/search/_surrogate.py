"""A Gaussian process over learning curves of many tasks; conditioned on the past, a target is a
plain Gaussian over its candidates' curves.

The covariance of two points (settings x, share s of a run, trial, task t of features m) is

    (v_all + v_like M(m, m') + v_own [t = t']) X(x, x') S(s, s')
        + v_level [t = t'] S(s, s') + v_trial [same trial] S(s, s'),

X a Matern-5/2 with one length per coordinate, S a Matern-5/2, M squared-exponential. The first
product says that settings do alike in all tasks, in tasks of like features, and in the task itself;
the second that a task is easy or hard; the third, which stands for a network that reads unfinished
curves, that a trial goes on as it began. Lengths, variances and noise maximise their posterior
under log-normal priors. A task of weight w has noise / w: its likelihood to the power w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

FITTED = 300
"""Points that the lengths and variances are fitted on, at most (ours)."""
KEPT = 2000
"""Points that the posterior is conditioned on, at most (ours; Quick-Tune: 4096)."""
STEPS = 40
"""L-BFGS iterations, at most (ours)."""
VARIANCES = ("all", "like", "own", "level", "trial")
PRIOR = {
    **dict.fromkeys(VARIANCES, (np.log(0.3), 1.0)),
    "noise": (np.log(0.01), 1.0),
    "share": (np.log(0.7), 0.5),
    "task": (0.0, 0.7),
    "settings": (np.log(0.7), 0.7),
}
"""Mean and deviation of each logarithm, of values of unit variance (ours); the length over
features is in units of the root of their number."""


@dataclass(frozen=True)
class Points:
    """Points of curves; `settings` (n, d), `features` (n, m), all else (n,)."""

    settings: Array
    features: Array
    share: Array
    task: NDArray[np.int64]
    trial: NDArray[np.int64]
    """Numbers that no two trials of any task share."""
    weight: Array

    def __len__(self) -> int:
        return len(self.share)

    def take(self, places: Any) -> Points:
        """Some of them."""
        return Points(**{name: value[places] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Gaussian:
    """Values at some places: mean (n,), covariance (n, n)."""

    mean: Array
    covariance: Array

    def given(self, places: list[int], values: Array, noise: float) -> Gaussian:
        """The same, with noisy values seen at some places."""
        if not places:
            return self
        seen = self.covariance[np.ix_(places, places)] + noise * np.eye(len(places))
        gain = np.linalg.solve(seen, self.covariance[places]).T  # (n, seen)
        mean = self.mean + gain @ (values - self.mean[places])
        return Gaussian(mean, self.covariance - gain @ self.covariance[places])

    @property
    def deviation(self) -> Array:
        """Standard deviations, (n,)."""
        return np.sqrt(np.maximum(np.diag(self.covariance), 1e-12))


class Curves:
    """The process; `fit` finds lengths and variances, `prior` conditions on the past."""

    def __init__(self, coordinates: int) -> None:
        names = [*VARIANCES, "noise", "share", "task"]
        self.prior_of = [*(PRIOR[name] for name in names), *[PRIOR["settings"]] * coordinates]
        self.logs = np.array([mean for mean, _ in self.prior_of])

    @property
    def noise(self) -> float:
        """Variance of one value's noise."""
        return float(np.exp(self.logs[len(VARIANCES)]))

    def fit(self, points: Points, values: Array, seed: int) -> None:
        """Maximise the posterior of lengths and variances on (some of) the points."""
        import torch
        from scipy.optimize import minimize

        if len(points) > FITTED:
            chosen = np.random.default_rng(seed).choice(len(points), FITTED, replace=False)
            points, values = points.take(np.sort(chosen)), values[np.sort(chosen)]
        target = torch.from_numpy(values)
        centre, width = (torch.tensor(column) for column in zip(*self.prior_of, strict=True))
        scatter = torch.from_numpy(1 / points.weight)

        def loss(logs: Array) -> tuple[float, Array]:
            own = torch.tensor(logs, requires_grad=True)
            noise = torch.diag(own[len(VARIANCES)].exp() * scatter + 1e-8)
            factor, bad = torch.linalg.cholesky_ex(_covariance(own, points, points) + noise)
            if bad:
                return 1e10, np.zeros_like(logs)
            white = torch.linalg.solve_triangular(factor, target[:, None], upper=False)
            value = 0.5 * white.square().sum() + factor.diagonal().log().sum()
            value = value + 0.5 * ((own - centre) / width).square().sum()
            value.backward()
            return float(value.detach()), own.grad.numpy()  # pyright: ignore

        start = np.array([mean for mean, _ in self.prior_of])
        self.logs = minimize(loss, start, jac=True, method="L-BFGS-B",
                             bounds=[(m - 6, m + 6) for m in start],
                             options={"maxiter": STEPS}).x  # fmt: skip

    def prior(self, past: Points | None, values: Array, target: Points, seed: int) -> Gaussian:
        """The target's points, given the past's values."""
        import torch

        logs = torch.from_numpy(self.logs)
        own = _covariance(logs, target, target)
        if past is None or not len(past):
            return Gaussian(np.zeros(len(target)), own.numpy())
        if len(past) > KEPT:
            chosen = np.sort(np.random.default_rng(seed).choice(len(past), KEPT, replace=False))
            past, values = past.take(chosen), values[chosen]
        noise = torch.from_numpy(self.noise / past.weight + 1e-8)
        factor = torch.linalg.cholesky(_covariance(logs, past, past) + torch.diag(noise))
        cross = torch.linalg.solve_triangular(factor, _covariance(logs, past, target), upper=False)
        white = torch.linalg.solve_triangular(
            factor, torch.from_numpy(values)[:, None], upper=False
        )
        return Gaussian((cross.T @ white)[:, 0].numpy(), (own - cross.T @ cross).numpy())


def _covariance(logs: Any, one: Points, other: Points) -> Any:
    """Of the values at two sets of points, (n, n'), without noise."""
    import torch

    scale = logs.exp()
    every, like, own, level, trial = scale[: len(VARIANCES)]
    share, task, settings = scale[6], scale[7], scale[8:]

    def apart(a: Array, b: Array, lengths: Any) -> Any:
        """Squared distances, (n, n')."""
        x, y = torch.from_numpy(a) / lengths, torch.from_numpy(b) / lengths
        cross = x @ y.T
        return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * cross).clamp_min(1e-12)

    def same(a: Any, b: Any) -> Any:
        return torch.from_numpy(a)[:, None] == torch.from_numpy(b)

    width = task * max(1, one.features.shape[1]) ** 0.5
    alike = torch.exp(-apart(one.features, other.features, width) / 2)
    along = _matern(apart(one.share[:, None], other.share[:, None], share))
    across = _matern(apart(one.settings, other.settings, settings))
    at_home = same(one.task, other.task)
    return along * (
        (every + like * alike + own * at_home) * across
        + level * at_home
        + trial * same(one.trial, other.trial)
    )


def _matern(squared: Any) -> Any:
    """Matern-5/2 of squared distances."""
    far = (5 * squared).sqrt()
    return (1 + far + far.square() / 3) * (-far).exp()
