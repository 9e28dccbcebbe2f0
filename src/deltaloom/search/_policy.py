"""Which trial goes on: candidates of one target, what was seen of them, and other tasks' past.

A value y enters as z = y / untuned - 1, or y - untuned where the base's own is not above 0; what is
worse than the untuned base, and a trial that failed, counts as the base itself, so that one that
nearly diverged flattens nothing (ours).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deltaloom.core.registry import get
from deltaloom.search._acquisition import Costs, log_improvement
from deltaloom.search._past import Task
from deltaloom.search._space import Dimension
from deltaloom.search._surrogate import Curves, Gaussian, Points

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Unit = Literal["flops", "seconds"]
FIRST = 3
"""Candidates that begin, in their order, where there is no past (Quick-Tune: 3, drawn)."""
IGNORED = 1e-3
"""A past task of smaller weight is left out."""
SIZES = ("rows", "row_tokens", "parameters")
"""Features in log2 that a part's cost is in proportion to, before anything is seen."""


@dataclass(frozen=True)
class Seen:
    """One part of one candidate: its value, None where it failed, and what it took."""

    candidate: int
    part: int
    value: float | None
    cost: float


class Policy:
    """Asked which candidate to go on with, and told what came of it."""

    def __init__(
        self,
        space: Mapping[str, Dimension],
        candidates: Sequence[Mapping[str, Any]],
        parts: int,
        target: Task,
        past: Sequence[Task] = (),
        weights: Sequence[float] | None = None,
        unit: Unit = "flops",
        seed: int = 0,
    ) -> None:
        """`target` has the features and the untuned value of the task; its trials are not read.

        `weights` say how far each past task is to be trusted, 0 to 1.
        """
        self.space, self.candidates, self.parts = space, candidates, parts
        self.target, self.unit, self.seed = target, unit, seed
        given = [1.0] * len(past) if weights is None else weights
        pairs = [
            (task, weight)
            for task, weight in zip(past, given, strict=True)
            if weight > IGNORED and any(one.curve or one.failed for one in task.trials)
        ]
        self.past, self.weights = [t for t, _ in pairs], [w for _, w in pairs]
        self.seen: list[Seen] = []
        self.features = features([*self.past, target])
        self.curves = Curves(sum(len(one.places(candidates[0][n])) for n, one in space.items()))
        self.grid = self._grid()
        self.prior, self.centre, self.scale = self._prior()
        self.past_costs = self._past_costs()

    def tell(self, seen: Seen) -> None:
        """What a part gave."""
        self.seen.append(seen)

    def ask(self) -> tuple[int, int] | None:
        """The next (candidate, part); None when all are done."""
        ahead = self.ahead()
        if not ahead:
            return None
        begun = {one.candidate for one in self.seen}
        if not self.past and len(begun) < FIRST:
            fresh = next((i for i in ahead if i not in begun), None)
            if fresh is not None:
                return fresh, 0
        places = [i * self.parts + part for i, part in ahead.items()]
        now = self.posterior()
        values = [(one.part, self._z(one.value)) for one in self.seen]
        best = [min([0.0, *(z for p, z in values if p <= part)]) for part in ahead.values()]
        found = (np.array(best) - self.centre) / self.scale
        gain = log_improvement(now.mean[places], now.deviation[places], found)
        chosen = int(np.argmax(gain - np.log(self._costs(list(ahead)))))
        return list(ahead.items())[chosen]

    def ahead(self) -> dict[int, int]:
        """Candidate -> its next part, of those that neither failed nor are done."""
        found = dict.fromkeys(range(len(self.candidates)), 0)
        for one in self.seen:
            found[one.candidate] = self.parts if one.value is None else one.part + 1
        return {i: part for i, part in found.items() if part < self.parts}

    def best(self) -> Seen | None:
        """The best measurement so far; the earliest of equals."""
        done = [one for one in self.seen if one.value is not None]
        return min(done, key=lambda one: one.value or 0.0, default=None)

    def posterior(self) -> Gaussian:
        """All candidates' curves, (candidate, part) in order, given what was seen."""
        values = np.array([self._z(one.value) for one in self.seen])
        places = [one.candidate * self.parts + one.part for one in self.seen]
        if not self.past and len(values):
            self.centre, self.scale = float(values.mean()), float(values.std()) or 1.0
            scaled = (values - self.centre) / self.scale
            self.curves.fit(self.grid.take(places), scaled, self.seed)
            self.prior = self.curves.prior(None, scaled, self.grid, self.seed)
        scaled = (values - self.centre) / self.scale
        return self.prior.given(places, scaled, self.curves.noise)

    def _z(self, value: float | None) -> float:
        return 0.0 if value is None else relative(self.target, value)

    def _grid(self) -> Points:
        """Every part of every candidate, as the target's points."""
        count, own = len(self.candidates), len(self.past)
        places = np.array([coordinates(self.space, one) for one in self.candidates])
        shares = (np.arange(self.parts) + 1.0) / self.parts
        return Points(
            np.repeat(places, self.parts, 0),
            np.repeat(self.features[own][None], count * self.parts, 0),
            np.tile(shares, count),
            np.full(count * self.parts, own),
            -1 - np.repeat(np.arange(count), self.parts),
            np.ones(count * self.parts),
        )

    def _prior(self) -> tuple[Gaussian, float, float]:
        """The target's curves after the past, and by what values are shifted and scaled."""
        if not self.past:
            return self.curves.prior(None, np.zeros(0), self.grid, self.seed), 0.0, 1.0
        points, values = self._past_points()
        centre, scale = float(values.mean()), float(values.std()) or 1.0
        self.curves.fit(points, (values - centre) / scale, self.seed)
        prior = self.curves.prior(points, (values - centre) / scale, self.grid, self.seed)
        return prior, centre, scale

    def _past_points(self) -> tuple[Points, Array]:
        rows: list[tuple[list[float], float, int, int]] = []
        values: list[float] = []
        trials = 0
        for number, task in enumerate(self.past):
            for trial in task.trials:
                place = coordinates(self.space, complete(task.tuner, trial.settings))
                curve = [(point.share, relative(task, point.value)) for point in trial.curve]
                if trial.failed is not None:
                    curve.append((1.0, 0.0))
                rows += [(place, share, number, trials) for share, _ in curve]
                values += [z for _, z in curve]
                trials += 1
        places, shares, tasks, numbers = (np.array(column) for column in zip(*rows, strict=True))
        weight = np.array(self.weights)[tasks]
        points = Points(places, self.features[tasks], shares, tasks, numbers, weight)
        return points, np.array(values)

    def _past_costs(self) -> tuple[Array, Array]:
        """Regressors and the cost of one part, of every past trial that tells it."""
        rows, costs = [], []
        for task in self.past:
            for trial in task.trials:
                spent = [getattr(point, self.unit) for point in trial.curve]
                if trial.curve and None not in spent and sum(spent) > 0:
                    rows.append(self._regressors(task, complete(task.tuner, trial.settings)))
                    costs.append(sum(spent) / trial.curve[-1].share / self.parts)
        return np.array(rows), np.array(costs)

    def _costs(self, wanted: list[int]) -> Array:
        """Predicted cost of one more part of candidates; what they took so far where it is seen."""
        own = [self._regressors(self.target, one) for one in self.candidates]
        took = {i: [s.cost for s in self.seen if s.candidate == i] for i in wanted}
        seen = np.array([own[one.candidate] for one in self.seen]).reshape(-1, len(own[0]))
        costs = np.array([one.cost for one in self.seen])
        model = Costs(["tokens", *self.space], {"tokens": 1.0, "epochs": 1.0})
        before, then = self.past_costs
        if len(then):
            level = 0.0
            if len(costs):  # another machine, another base: the slopes hold, the level is its own
                ratio = np.log(np.maximum(costs, 1e-12) / model.predict(before, then, seen))
                level = float(ratio.mean())
            found = model.predict(before, then, np.array(own)[wanted]) * math.exp(level)
        else:
            found = model.predict(seen, costs, np.array(own)[wanted])
        known = [np.mean(took[i]) if took[i] else found[k] for k, i in enumerate(wanted)]
        return np.maximum(np.array(known), 1e-9 * max(known))

    def _regressors(self, task: Task, settings: Mapping[str, Any]) -> list[float]:
        """Log tokens times log parameters of a pass, and one number for each setting."""
        tokens = sum(task.features.get(name, 0.0) for name in SIZES) * math.log(2)
        return [tokens, *(_number(one, settings.get(n)) for n, one in self.space.items())]


def coordinates(space: Mapping[str, Dimension], settings: Mapping[str, Any]) -> list[float]:
    """Settings as a point; what a range cannot place lies in its middle."""
    found: list[float] = []
    for name, one in space.items():
        value = settings.get(name)
        unplaced = one.choices is None and not isinstance(value, int | float)
        found += [0.5] if unplaced else one.places(value)
    return found


def complete(tuner: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the tuner's own where none is given; unknown ones are left as they are."""
    fields = get("tune", tuner).load().model_fields
    defaults = {name: field.default for name, field in fields.items() if not field.is_required()}
    return {**defaults, **settings}


def relative(task: Task, value: float) -> float:
    """A value relative to the untuned base's; where that is unknown, to the worst first value."""
    untuned = task.untuned
    if untuned is None:
        untuned = max((t.curve[0].value for t in task.trials if t.curve), default=value)
    return min(0.0, value / untuned - 1 if untuned > 0 else value - untuned)


def features(tasks: Sequence[Task]) -> Array:
    """Features (tasks, m) of zero mean and unit deviation; a missing one is the mean."""
    names = sorted({name for task in tasks for name in task.features})
    rows = [[task.features.get(name, math.nan) for name in names] for task in tasks]
    table = np.array(rows, dtype=float).reshape(len(tasks), len(names))
    known = ~np.isnan(table)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, table, 0).sum(0) / count
    away = np.where(known, table - mean, 0.0)
    deviation = np.sqrt((away**2).sum(0) / count)
    return away / np.where(deviation > 1e-9, deviation, 1.0)


def _number(one: Dimension, value: Any) -> float:
    """A setting as a cost's regressor: the log of what is positive, the place of a choice."""
    if one.choices is not None:
        places = one.places(value)
        return float(places.index(1.0)) if 1.0 in places else 0.0
    if not isinstance(value, int | float):
        return 0.0
    return math.log(value) if value > 0 else float(value)
