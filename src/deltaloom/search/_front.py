"""Trials by more than one goal: what no other beats, in layers, and the area that a front holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from deltaloom.core.method import Trial

Goals = Mapping[str, Literal["lower", "higher"]]
"""What is measured of each trial, and which way is better."""


def pareto(trials: Sequence[Trial], goals: tuple[str, str]) -> list[Trial]:
    """The finished trials that no other is at least as good as in both, the best by the first goal
    first; the earliest of equals.
    """
    done = [trial for trial in trials if trial.failed is None]
    order = sorted(done, key=lambda t: (t.values[goals[0]], t.values[goals[1]], t.number))
    front: list[Trial] = []
    for trial in order:
        if not front or trial.values[goals[1]] < front[-1].values[goals[1]]:
            front.append(trial)
    return front


def unbeaten(trials: Sequence[Trial], goals: Goals) -> list[Trial]:
    """The finished trials that no other is better than in one goal and no worse than in all."""
    left = [trial for trial in trials if trial.failed is None]
    signs = {name: 1.0 if way == "lower" else -1.0 for name, way in goals.items()}
    points = {t.number: [sign * t.values[name] for name, sign in signs.items()] for t in left}
    return [
        one
        for one in left
        if not any(_beats(points[other.number], points[one.number]) for other in left)
    ]


def ranked(trials: Sequence[Trial], goals: Goals) -> list[Trial]:
    """The finished trials: those that none beats first, then those that only they beat, and so on;
    within such a layer by the first goal, the earliest of equals.
    """
    left, found = list(trials), list[Trial]()
    goal, way = next(iter(goals.items()))
    sign = 1.0 if way == "lower" else -1.0
    while layer := unbeaten(left, goals):
        found += sorted(layer, key=lambda t: (sign * t.values[goal], t.number))
        left = [one for one in left if one not in layer]
    return found


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area of what `points` beat and `reference` does not, both goals the lower the better."""
    area, below = 0.0, reference[1]
    for first, second in sorted(points):
        if first < reference[0] and second < below:
            area += (reference[0] - first) * (below - second)
            below = second
    return area


def _beats(one: list[float], other: list[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
