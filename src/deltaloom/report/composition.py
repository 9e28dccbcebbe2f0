"""How well skills combine: a heat map of skills and k for each model, and texts to read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaloom.report import numbers
from deltaloom.report.reading import Report, Step, json_lines, number

DOCUMENT, TRANSCRIPTS = "skillmix.json", "transcripts.jsonl"
READ = 4
"""Good texts and bad texts shown of one model."""
SHADES = 10
CUT = 2000
"""Characters shown of one text."""


@dataclass(frozen=True)
class Cell:
    """A share with its interval; `shade` is 0 to 10."""

    value: str
    interval: str
    shade: int
    n: int


@dataclass(frozen=True)
class Transcript:
    """One text with what it was asked to show and what it lost."""

    k: int
    topic: str
    skills: tuple[str, ...]
    lost: tuple[str, ...]
    text: str
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Composition:
    """One model's Skill-Mix."""

    label: str
    ks: tuple[int, ...]
    full: tuple[Cell | None, ...]
    efficiency: tuple[Cell | None, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    """Every skill with its point's share at each k."""
    counts: tuple[tuple[str, str], ...]
    """What was missing or left out, where any was."""
    good: tuple[Transcript, ...]
    bad: tuple[Transcript, ...]
    problem: str | None = None


def compositions(report: Report) -> list[Composition]:
    """Every model of every measure step that left a Skill-Mix, in the order measured."""
    return [
        _composition(f"{report.label(step)}: {path.parent.name.partition('--')[0]}", path)
        for step in report.of_verb("measure")
        for path in _documents(step)
    ]


def _documents(step: Step) -> list[Path]:
    found = sorted(step.folder.glob(f"*--*/{DOCUMENT}"))
    order = step.names("deltas")
    places = {Path(name).name: place for place, name in enumerate(order)}

    def place(path: Path) -> int:
        return places.get(path.parent.name.partition("--")[0], len(order))

    return sorted(found, key=place)


def _composition(label: str, path: Path) -> Composition:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        ks = tuple(sorted(int(k) for k in document["by_k"]))
        skills: dict[str, dict[int, Cell]] = {}
        for row in document["by_skill"]:
            skills.setdefault(str(row["skill"]), {})[int(row["k"])] = heat_cell(row)
        full = tuple(heat_cell(document["by_k"][str(k)]["full_marks"]) for k in ks)
        costs = document["efficiency"]
        efficiency = tuple(heat_cell(costs[str(k)]) if costs.get(str(k)) else None for k in ks)
        counts = tuple(
            (key.replace("_", " "), numbers.tick(value))
            for key, value in document["counts"].items()
            if number(value)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        empty: tuple[Any, ...] = ()
        problem = f"The result cannot be read: {error!r}"
        return Composition(label, (), empty, empty, empty, empty, empty, empty, problem)
    rows = tuple((name, tuple(cells.get(k) for k in ks)) for name, cells in sorted(skills.items()))
    good, bad = _transcripts(path.parent / TRANSCRIPTS)
    return Composition(label, ks, full, efficiency, rows, counts, good, bad)


def heat_cell(one: dict[str, Any]) -> Cell:
    """An Estimate's JSON as a cell; ValueError, KeyError or TypeError for anything else."""
    value, low, high = (number(one[key]) for key in ("value", "low", "high"))
    if value is None:
        raise ValueError("a value is no number")
    known = low is not None and high is not None
    return Cell(
        value=numbers.plain(value, 2),
        interval=numbers.interval(low, high) if known else numbers.UNKNOWN,  # pyright: ignore
        shade=round(SHADES * min(1.0, max(0.0, value))),
        n=int(one["n"]),
    )


def _transcripts(path: Path) -> tuple[tuple[Transcript, ...], tuple[Transcript, ...]]:
    """The full marks of the largest k, and of the rest those that lost the fewest points."""
    read = [row for row in json_lines(path) if isinstance(row.get("points"), dict)]
    read = [row for row in read if isinstance(row.get("text"), str)]
    read.sort(key=lambda row: (-int(row.get("k") or 0), str(row.get("id"))))
    shown = [_transcript(row) for row in read]
    good = [one for one in shown if not one.lost]
    bad = sorted((one for one in shown if one.lost), key=lambda one: len(one.lost))
    return tuple(good[:READ]), tuple(bad[:READ])


def _transcript(row: dict[str, Any]) -> Transcript:
    return Transcript(
        k=int(row.get("k") or 0),
        topic=str(row.get("topic")),
        skills=tuple(map(str, row.get("skills") or ())),
        lost=tuple(name for name, point in row["points"].items() if not point),
        text=row["text"][:CUT],
        turns=tuple(
            (str(turn.get("role")), str(turn.get("content"))[:CUT])
            for turn in row.get("conversation") or ()
        ),
    )
