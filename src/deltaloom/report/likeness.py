"""How alike models represent the same rows, layer by layer, from what `measure cka` left."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaloom.report import numbers
from deltaloom.report.reading import Report, Step, number
from deltaloom.report.svg import Series

FILE = "cka.json"


@dataclass(frozen=True)
class Line:
    """One model beside the other one, and the colour of its line."""

    label: str
    colour: int
    value: float | None
    """The mean over the blocks."""
    layers: dict[str, tuple[float | None, str]]
    """By layer, in order: CKA, where it is known, and the text of it with its interval."""

    @property
    def series(self) -> Series:
        """Its layers as points, by their place."""
        points = [(i, one) for i, (one, _) in enumerate(self.layers.values()) if one is not None]
        return Series(self.label, points, self.colour, dots=True)


@dataclass(frozen=True)
class Likeness:
    """All models that one step compared with the same other one on the same rows."""

    label: str
    task: str
    other: str
    lines: tuple[Line, ...]
    problems: tuple[str, ...]

    @property
    def layers(self) -> list[str]:
        """Names of the layers, those of the deepest model."""
        return list(max((line.layers for line in self.lines), key=len, default={}))


def likenesses(report: Report) -> list[Likeness]:
    """Every step and task with layers, in the order in which the runs name them."""
    found = []
    for step in report.of_verb("measure"):
        if step.method != "cka":
            continue
        by_task: dict[str, list[tuple[str, Path]]] = {}
        for path in sorted(step.folder.glob(f"*--*/{FILE}")):
            label, task = path.parent.name.split("--", 1)
            by_task.setdefault(task, []).append((label, path))
        named = [Path(name).name for name in step.names("deltas")]
        for task, paths in by_task.items():
            paths.sort(key=lambda one: named.index(one[0]) if one[0] in named else len(named))
            found.append(_likeness(report, step, task, paths))
    return found


def _likeness(report: Report, step: Step, task: str, paths: list[tuple[str, Path]]) -> Likeness:
    lines, problems = [], []
    for label, path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            layers = {str(one["layer"]): _layer(one) for one in content["layers"]}
            lines.append(Line(label, len(lines), number(content.get("value")), layers))
        except (OSError, ValueError, KeyError, TypeError):
            problems.append(f"{label}: {path.parent.name}/{FILE} cannot be read")
    other = step.settings.get("other")
    name = Path(str(other)).name if other else "the base"
    return Likeness(report.label(step), task, name, tuple(lines), tuple(problems))


def _layer(one: dict[str, Any]) -> tuple[float | None, str]:
    value, low, high = (number(one.get(key)) for key in ("cka", "low", "high"))
    if value is None:
        return None, numbers.UNKNOWN
    if low is None or high is None:
        return value, numbers.plain(value, 3)
    text = numbers.plain(value, numbers.places(low, high))
    return value, f"{text} {numbers.interval(low, high)}"
