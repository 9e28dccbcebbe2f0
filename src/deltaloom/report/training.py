"""Training curves from `metrics.jsonl`: losses of all steps, and what was measured on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deltaloom.report.reading import Report, Step, json_lines, number
from deltaloom.report.svg import Series

POINTS = 200
"""Longer curves are thinned to about this many points."""
SMOOTHED = 20
"""Curves of at least so many points also get a running mean over a twentieth of them."""
EVALUATION = "evaluation_"


@dataclass(frozen=True)
class Curve:
    """One step's training in figures, and the colour of its line."""

    label: str
    colour: int
    steps: int
    first: float
    last: float
    lowest: float
    best: str
    notes: dict[str, Any]


@dataclass(frozen=True)
class Training:
    """All curves: losses, and evaluations by what they measured."""

    losses: tuple[Series, ...]
    evaluations: dict[str, tuple[Series, ...]]
    curves: tuple[Curve, ...]


def training(report: Report) -> Training:
    """Read the logs of every step that trained."""
    losses: list[Series] = []
    evaluations: dict[str, list[Series]] = {}
    curves: list[Curve] = []
    for step in report.steps:
        logged = list(json_lines(step.folder / "metrics.jsonl"))
        points = _points(logged, "loss")
        if not points:
            continue
        colour = len(curves)
        label = report.label(step) + (" (warm-up)" if step.verb != "tune" else "")
        if len(points) >= SMOOTHED:
            losses.append(Series(f"{label}, as logged", _thin(points), colour, faint=True))
            losses.append(Series(label, _thin(_mean(points)), colour))
        else:
            losses.append(Series(label, points, colour))
        best = []
        for key in sorted({key for line in logged for key in line if key.startswith(EVALUATION)}):
            values = _points(logged, key)
            if values:
                name = key.removeprefix(EVALUATION)
                one = Series(label, _thin(values), colour, dots=len(values) <= 60)
                evaluations.setdefault(name, []).append(one)
                best.append(f"{name} {values[-1][1]:.4g} at the end")
        curves.append(_curve(label, colour, points, _best(step) or "; ".join(best), step))
    return Training(
        tuple(losses), {name: tuple(found) for name, found in evaluations.items()}, tuple(curves)
    )


def _curve(
    label: str, colour: int, points: list[tuple[float, float]], best: str, step: Step
) -> Curve:
    values = [value for _, value in points]
    return Curve(
        label,
        colour,
        int(points[-1][0]),
        values[0],
        values[-1],
        min(values),
        best,
        step.record.get("notes", {}),
    )


def _best(step: Step) -> str:
    found = step.record.get("notes", {}).get("best_evaluation")
    value = number(found.get("value")) if isinstance(found, dict) else None
    if value is None:
        return ""
    return f"{value:.4g} at step {found.get('step')}, kept"


def _points(logged: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    found: dict[float, float] = {}
    for line in logged:
        step, value = number(line.get("step")), number(line.get(key))
        if step is not None and value is not None:
            found[step] = value
    return sorted(found.items())


def _mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value's mean with its neighbours, as many on either side except at the end."""
    reach = max(1, len(points) // 40)
    found = []
    for i, (step, _) in enumerate(points):
        near = min(reach, i)
        around = [value for _, value in points[i - near : i + near + 1]]
        found.append((step, sum(around) / len(around)))
    return found


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    every = max(1, math.ceil(len(points) / POINTS))
    kept = points[::every]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
