"""Searches: their trials, the front of two goals, and the coordinate check, drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltaloom.report.reading import Report, Step, json_lines, number
from deltaloom.report.svg import Series

TRIALS, COORDINATES, FRONT = "trials.jsonl", "coordinates.json", "front.json"
SHOWN = 200
"""Trials in the table, at most."""


@dataclass(frozen=True)
class Row:
    """One trial."""

    number: int
    settings: str
    values: str
    tokens: float | None
    failed: str | None
    chosen: bool


@dataclass(frozen=True)
class Lines:
    """A chart: its name, its lines and what lies across."""

    name: str
    series: tuple[Series, ...]
    x_name: str


@dataclass(frozen=True)
class Search:
    """One search step."""

    label: str
    step: Step
    rows: tuple[Row, ...]
    count: int
    failed: int
    charts: tuple[Lines, ...]


def searches(report: Report) -> list[Search]:
    """Every search step that left trials."""
    return [
        _search(report, step)
        for step in report.of_verb("search")
        if (step.folder / TRIALS).exists()
    ]


def _search(report: Report, step: Step) -> Search:
    trials = list(json_lines(step.folder / TRIALS))
    choice = step.results.get("choice")
    chosen = choice.get("trial") if isinstance(choice, dict) else None
    charts = [*_sweep(trials), *_front(step), *_coordinates(step)]
    return Search(
        label=report.label(step),
        step=step,
        rows=tuple(_row(trial, chosen) for trial in trials[:SHOWN]),
        count=len(trials),
        failed=sum(bool(trial.get("failed")) for trial in trials),
        charts=tuple(charts),
    )


def _row(trial: dict[str, Any], chosen: Any) -> Row:
    cost = trial.get("cost") if isinstance(trial.get("cost"), dict) else {}
    return Row(
        int(number(trial.get("number")) or 0),
        _said(trial.get("settings")),
        _said(trial.get("values")),
        number((cost or {}).get("backward_tokens")),
        trial.get("failed"),
        trial.get("number") == chosen,
    )


def _said(mapping: Any) -> str:
    if not isinstance(mapping, dict):
        return ""
    texts = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in mapping.values())
    return ", ".join(f"{key} = {text}" for key, text in zip(mapping, texts, strict=True))


def _sweep(trials: Sequence[dict[str, Any]]) -> list[Lines]:
    """What is measured over the one setting that was searched; nothing for more settings."""
    done = [trial for trial in trials if trial.get("values") and not trial.get("failed")]
    names = {key for trial in done for key in trial["settings"]}
    if len(names) != 1:
        return []
    (name,) = names
    found = [(number(trial["settings"].get(name)), trial["values"]) for trial in done]
    places = [(math.log2(x), values) for x, values in found if x is not None and x > 0]
    if len(places) < 3:
        return []
    return [
        Lines(
            f"{goal} of each trial",
            (Series(goal, sorted((x, values[goal]) for x, values in places), dots=True),),
            f"log2 {name}",
        )
        for goal in done[0]["values"]
    ]


def _front(step: Step) -> list[Lines]:
    """The points that no other trial beats: as searched, and on rows left untouched."""
    try:
        found = json.loads((step.folder / FRONT).read_text(encoding="utf-8"))
        places = [(math.log2(1 + one["parameters"]), one) for one in found]
        series = [
            Series(label, sorted((x, one[key]) for x, one in places if key in one), k, dots=True)
            for k, (key, label) in enumerate(
                (("objective", "as searched"), ("untouched", "on untouched rows"))
            )
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    drawn = tuple(one for one in series if one.points)
    name = "The front: no other trial is better in both"
    return [Lines(name, drawn, "log2 of trained parameters")] if drawn else []


def _coordinates(step: Step) -> list[Lines]:
    """Changes of activations over widths and over depths, both on log scales."""
    try:
        found = json.loads((step.folder / COORDINATES).read_text(encoding="utf-8"))
        last = max(one["step"] for one in found)
        kept = [one for one in found if one["step"] == last and one["change"]]
        return [chart for over in ("width", "layers") for chart in _changes(kept, over, last)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _changes(found: list[dict[str, Any]], over: str, last: int) -> list[Lines]:
    places = list(dict.fromkeys(one["place"] for one in found))
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for one in found:
        if one["over"] == over:
            point = (math.log2(one[over]), math.log2(one["change"]))
            lines.setdefault((one["rule"], one["place"]), []).append(point)
    series = tuple(
        Series(f"{place}, {rule}", points, places.index(place), dots=True, faint=rule == "standard")
        for (rule, place), points in lines.items()
    )
    if not series or len({x for one in series for x, _ in one.points}) < 2:
        return []
    across = {"width": "log2 hidden size", "layers": "log2 layers"}[over]
    name = f"Coordinate check: log2 change of activations after {last} steps"
    return [Lines(name, series, across)]
