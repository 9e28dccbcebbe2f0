"""Tasks by stages: what each task of a staged tuning measured before and after each stage."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from deltaloom.report import numbers
from deltaloom.report.reading import Report, Step, number

FILE = "stages.json"


@dataclass(frozen=True)
class Cell:
    """One task after one stage."""

    value: str
    change: str
    """Paired change since the stage before, with its interval; empty where there is none."""
    better: bool | None
    """Whether the change's interval excludes zero, and to which side; None where it does not."""


@dataclass(frozen=True)
class Line:
    """One task."""

    task: str
    rows: str
    kept: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Staged:
    """One tune step in stages."""

    label: str
    step: Step
    stages: tuple[str, ...]
    lines: tuple[Line, ...]
    metric: str
    problem: str | None


def staged(report: Report) -> list[Staged]:
    """Every tune step that left a table of stages."""
    return [
        _staged(report, step) for step in report.of_verb("tune") if (step.folder / FILE).exists()
    ]


def _staged(report: Report, step: Step) -> Staged:
    try:
        record = json.loads((step.folder / FILE).read_text(encoding="utf-8"))
        stages = [one for one in record["stages"] if isinstance(one, dict)]
        tasks = {str(name): int(count) for name, count in record["tasks"].items()}
        left_out = {str(name) for name in record["left_out"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{FILE} cannot be read: {error}"
        return Staged(report.label(step), step, (), (), "", what)
    measured = {name for one in stages for name in _mapping(one.get("estimates"))}
    lines = tuple(
        Line(
            task,
            numbers.count(tasks[task]) if task in tasks else "–",
            task not in left_out,
            tuple(_cell(_mapping(_mapping(one.get("estimates")).get(task))) for one in stages),
        )
        for task in sorted(tasks.keys() | measured, key=lambda name: (-tasks.get(name, 0), name))
    )
    metrics = {
        str(_mapping(found).get("metric"))
        for one in stages
        for found in _mapping(one.get("estimates")).values()
    }
    names = tuple(str(one.get("name")) for one in stages)
    return Staged(report.label(step), step, names, lines, ", ".join(sorted(metrics)), None)


def _cell(estimate: dict[str, Any]) -> Cell:
    value, low, high = _ends(estimate)
    if value is None:
        return Cell("–", "", None)
    decimals = numbers.places(low, high)
    change, better = _mapping(estimate.get("change")), None
    gain, down, up = _ends(change)
    text = ""
    if gain is not None:
        text = f"{numbers.signed(gain, numbers.places(down, up))} {numbers.interval(down, up)}"
        if down > 0 or up < 0:
            better = (down > 0) == (estimate.get("better") == "higher")
    return Cell(f"{numbers.plain(value, decimals)} {numbers.interval(low, high)}", text, better)


def _ends(found: dict[str, Any]) -> tuple[float | None, float, float]:
    low, high = number(found.get("low")), number(found.get("high"))
    unknown = (-math.inf if low is None else low, math.inf if high is None else high)
    return (number(found.get("value")), *unknown)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
