"""Proposals by Gaussian processes with sparse axes, for many settings of which few matter.

Papers: Eriksson & Jankowiak 2021, "High-Dimensional Bayesian Optimization with Sparse Axis-Aligned
Subspaces" (arXiv 2103.00049); Daulton et al. 2021, "Parallel Bayesian Optimization of Multiple
Noisy Objectives with Expected Hypervolume Improvement" (arXiv 2105.08195); Ament et al. 2023,
"Unexpected Improvements to Expected Improvement" (arXiv 2310.20708); the search over neighbours is
AutoPEFT's (arXiv 2301.12132).

Each goal, standardised, has an ensemble of Matern-5/2 processes in which tau / length^2 of every
axis has a half-Cauchy prior of scale 1, tau itself drawn from one of scale 0.1 for each member:
most axes are taken for flat until the trials say otherwise. What is proposed has, of the settings
not tried yet, the largest logarithm of expected improvement: of the hypervolume above what is a
little worse than all seen, or of the only goal. Trials under way count by what is expected of them.
Spaces of up to `ENUMERATED` settings are looked at whole. In larger ones the best of random
settings and of the front's neighbours, which differ from it in one dimension, go on to their best
neighbour until none is better.

Differs: lengths are the most probable ones (BoTorch's `EnsembleMapSaasSingleTaskGP`), where the
papers sample them; AutoPEFT's goals are ranks made normal, which hide how far apart sizes are.

Not covered: ranges of real numbers.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltaloom.core.errors import InputError
from deltaloom.search._front import Goals
from deltaloom.search._space import Dimension

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.search._proposing import Meaning

SAMPLES = 64
"""Draws of the posterior behind an expectation (ours; Optuna's Gaussian-process sampler: 128)."""
BEYOND = 0.1
"""From the worst seen to the hypervolume's reference, as a share of the range seen (BoTorch's
`infer_reference_point`, there of the front's range)."""
ENUMERATED = 2000
"""Settings of a space that is looked at whole (AutoPEFT's `max_eval` of its local search)."""
DRAWN, CLIMBS = 128, 2
"""Random settings, and as many of the front's neighbours; how many of all these go on (ours: more
of them ended in the same settings; AutoPEFT: 10 climbs)."""
CHUNK = 256
"""Settings looked at together, which bounds memory."""


def check_installed() -> None:
    """Raise InputError where BoTorch is missing."""
    try:
        import botorch  # noqa: F401
    except ImportError:
        raise InputError(
            'surrogate = saas needs BoTorch: pip install "deltaloom[botorch]"'
        ) from None


def propose(
    space: Mapping[str, Dimension],
    goals: Goals,
    known: Sequence[dict[str, Any]],
    values: Mapping[int, Sequence[float]],
    seed: int,
    meaning: Meaning | None = None,
) -> dict[str, Any]:
    """Settings whose `meaning` was not tried yet and is not None, while there are any.

    `known` has the settings of all trials so far, `values` the goals of those that are done, at
    least one. Raises ValueError for a space with a range of real numbers.
    """
    import torch
    from botorch.utils.multi_objective.pareto import is_non_dominated

    grid = _Grid(space, known, meaning or (lambda one: repr(sorted(one.items()))))
    tried = grid.points(known)  # (trials, dimensions)
    done = [number for number in range(len(known)) if number in values]
    waiting = [number for number in range(len(known)) if number not in values]
    signs = torch.tensor([-1.0 if way == "lower" else 1.0 for way in goals.values()])
    targets = signs * torch.tensor([list(values[number]) for number in done]).double()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BoTorch's about itself and about how well it fits
        torch.manual_seed(seed)
        places = grid.places(tried)
        gain = _improvement(places[done], targets, places[waiting], seed)
        with torch.no_grad():

            def score(points: Tensor) -> Tensor:  # (n, dimensions) -> (n,)
                parts = grid.places(points)[:, None].split(CHUNK)
                return torch.cat([gain(part) for part in parts])

            best = grid.best(score, tried[done][is_non_dominated(targets)])
    return grid.settings(best)


def _improvement(done: Tensor, targets: Tensor, waiting: Tensor, seed: int) -> Any:
    """Log expected improvement of places (n, 1, width), the higher the better, over `done` ones
    (trials, width) with `targets` (trials, goals), all goals the higher the better.
    """
    import torch
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import ModelListGP
    from botorch.models.map_saas import EnsembleMapSaasSingleTaskGP
    from botorch.sampling import SobolQMCNormalSampler
    from gpytorch.mlls import ExactMarginalLogLikelihood

    spread = targets.std(0, correction=0).clamp_min(1e-9)  # (goals,)
    scaled = (targets - targets.mean(0)) / spread
    models = []
    for column in scaled.T:
        model = EnsembleMapSaasSingleTaskGP(done, column[:, None], outcome_transform=None)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        models.append(model)
    shared = {
        "X_baseline": done,
        "sampler": SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=seed),
        "X_pending": waiting if len(waiting) else None,
        "prune_baseline": True,
    }
    if len(models) == 1:
        return qLogNoisyExpectedImprovement(models[0], **shared)
    low, high = scaled.aminmax(dim=0)
    # At the worst seen itself the extremes of a front would gain nothing.
    reference = low - BEYOND * (high - low)
    return qLogNoisyExpectedHypervolumeImprovement(ModelListGP(*models), reference, **shared)


class _Grid:
    """The settings of a space; a point is a row of positions among each dimension's values."""

    def __init__(
        self, space: Mapping[str, Dimension], known: Sequence[dict[str, Any]], meaning: Meaning
    ) -> None:
        import torch

        self.meaning = meaning
        # Meanings that are not to be proposed.
        self.out = {meaning(one) for one in known} | {None}
        self.values = {name: _values(name, one) for name, one in space.items()}
        self.tables = [
            torch.tensor([space[name].places(value) for value in own]).double()
            for name, own in self.values.items()
        ]  # a dimension's places: (values, 1 or as many as choices)

    def points(self, settings: Sequence[dict[str, Any]]) -> Tensor:
        """Settings as positions."""
        import torch

        where = {n: {repr(v): k for k, v in enumerate(own)} for n, own in self.values.items()}
        return torch.tensor([[own[repr(one[n])] for n, own in where.items()] for one in settings])

    def places(self, points: Tensor) -> Tensor:
        """Positions as coordinates in [0, 1]."""
        import torch

        columns = zip(self.tables, points.T, strict=True)
        return torch.cat([table[column] for table, column in columns], 1)

    def settings(self, point: Tensor) -> dict[str, Any]:
        """One point as settings."""
        found = zip(self.values.items(), point.tolist(), strict=True)
        return {name: own[position] for (name, own), position in found}

    def fresh(self, points: Tensor) -> Tensor:
        """Those that are worth a trial and were not tried."""
        import torch

        kept = [self.meaning(self.settings(point)) not in self.out for point in points]
        return points[torch.tensor(kept, dtype=torch.bool)]

    def best(self, score: Callable[[Tensor], Tensor], front: Tensor) -> Tensor:
        """The fresh point of the highest score; of all points when none is left."""
        import torch

        sizes = [len(table) for table in self.tables]
        if math.prod(sizes) <= ENUMERATED:
            points = torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, len(sizes))
        else:
            drawn = [torch.randint(size, (DRAWN,)) for size in sizes]
            near = self.neighbours(front)
            points = torch.cat([torch.stack(drawn, 1), near[torch.randperm(len(near))[:DRAWN]]])
        left = self.fresh(points)
        points = left if len(left) else points
        scores = score(points)
        first = scores.topk(min(CLIMBS, len(scores))).indices
        ends = [self.climbed(score, points[one], scores[one]) for one in first]
        return max(ends, key=lambda end: end[1])[0]

    def climbed(
        self, score: Callable[[Tensor], Tensor], point: Tensor, value: Tensor
    ) -> tuple[Tensor, float]:
        """From neighbour to neighbour, until none is better; and how good that is."""
        while True:
            near = self.fresh(self.neighbours(point[None]))
            scores = score(near) if len(near) else value[None] - 1
            if scores.max() <= value:
                return point, value.item()
            point, value = near[scores.argmax()], scores.max()

    def neighbours(self, points: Tensor) -> Tensor:
        """Points that differ in one dimension from one of `points`, and these."""
        import torch

        found = []
        for dimension, table in enumerate(self.tables):
            for position in range(len(table)):
                near = points.clone()
                near[:, dimension] = position
                found.append(near)
        return torch.cat(found).unique(dim=0)


def _values(name: str, one: Dimension) -> list[Any]:
    if one.choices is not None:
        return one.choices
    if not one.integer:
        raise ValueError(f"{name} is a range of real numbers")
    assert one.low is not None
    assert one.high is not None
    return list(range(int(one.low), int(one.high) + 1))
