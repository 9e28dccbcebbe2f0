"""Judges: how far each agrees with people, what sways it, win rates, and disagreements to read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaloom.report import numbers
from deltaloom.report.reading import Report, Step, json_lines, number

SHOWN = 12
"""Disagreements listed; the judge is the surest of these."""
LONGEST = 600
"""Characters of a text that are shown."""
RATES = ("accuracy", "kappa", "quadratic_kappa", "spearman")
BIASES = {
    "first": "First place wins both times",
    "second": "Second place wins both times",
    "longer_wins": "Longer response wins",
    "longer_wins_people": "Longer response wins, by people",
    "length": "Swayed by padding",
    "bandwagon": "Swayed by a majority",
    "egocentric": "Swayed by authorship",
    "attention": "Swayed by a distraction",
}
SCORES = ("judge", "gold", "corrected", "rogan_gladen")


@dataclass(frozen=True)
class Cell:
    """One estimate as it is shown."""

    value: str
    interval: str


@dataclass(frozen=True)
class Disagreement:
    """A row on which a judge and people differ."""

    id: str
    instruction: str
    responses: tuple[tuple[str, str], ...]
    """Name and text of each."""
    people: str
    judge: str
    sure: str
    """Probability that the judge gave its verdict; empty where it said both."""
    texts: tuple[str, ...]
    """What the judge wrote, if it did."""


@dataclass(frozen=True)
class Judged:
    """One judge on one task."""

    label: str
    rates: tuple[tuple[str, Cell], ...]
    biases: tuple[tuple[str, Cell], ...]
    scores: tuple[tuple[str, Cell], ...]
    """The judged quantity: as judged, by labels alone, corrected."""
    subsets: tuple[tuple[str, Cell], ...]
    wins: tuple[tuple[str, Cell | None, Cell | None], ...]
    """Model, its win rate by the judge and by people."""
    failures: tuple[tuple[str, int], ...]
    disagreements: tuple[Disagreement, ...]
    differing: int
    problem: str | None = None


def judgings(report: Report) -> list[Judged]:
    """Every judge that a measure step of these runs left a record of."""
    return [
        _judged(report, step, path)
        for step in report.of_verb("measure")
        if step.method == "judge"
        for path in sorted(step.folder.glob("*--*/judge.json"))
    ]


def _judged(report: Report, step: Step, path: Path) -> Judged:
    name, _, task = path.parent.name.partition("--")
    label = (
        f"{name} on {task}"
        if report.find(name, step)
        else f"{report.label(step)}: {name} on {task}"
    )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found, dict)
    except (OSError, ValueError, AssertionError) as error:
        problem = f"The judgements cannot be read: {error}"
        return Judged(label, (), (), (), (), (), (), (), 0, problem)
    differing = sorted(_differing(path.parent / "verdicts.jsonl"), key=lambda one: -one[0])
    agreement = found.get("agreement", {})
    return Judged(
        label=label,
        rates=_cells(agreement, {key: key.replace("_", " ") for key in RATES}),
        biases=_cells(found.get("biases", {}), BIASES),
        scores=_cells(found.get("scores", {}), {key: key.replace("_", "–") for key in SCORES}),
        subsets=_cells(found.get("subsets", {}), {key: key for key in found.get("subsets", {})}),
        wins=tuple(
            (model, cell(sides.get("judge")), cell(sides.get("people")))
            for model, sides in found.get("win_rates", {}).items()
        ),
        failures=tuple(found.get("failures", {}).items()),
        disagreements=tuple(one for _, one in differing[:SHOWN]),
        differing=len(differing),
    )


def _differing(path: Path) -> Iterator[tuple[float, Disagreement]]:
    """Rows on which the judge does not say what people say, with how sure it is."""
    for row in json_lines(path):
        people, judge = row.get("label"), row.get("verdict")
        if people is None or judge is None or people == judge:
            continue
        shares = row.get("shares")
        share = number(shares.get(judge)) if isinstance(shares, dict) else None
        texts = [str(text) for text in row.get("responses") or ()]
        names = {1: ("Response",), 2: ("A", "B")}.get(len(texts), range(1, 1 + len(texts)))
        yield (
            share or 0.0,
            Disagreement(
                id=str(row.get("id")),
                instruction=_short(row.get("instruction")),
                responses=tuple(zip(names, map(_short, texts), strict=False)),
                people=str(people),
                judge=str(judge),
                sure="" if share is None else numbers.share(share, 1),
                texts=tuple(_short(text) for text in row.get("texts") or ()),
            ),
        )


def _cells(found: Any, names: Mapping[str, str]) -> tuple[tuple[str, Cell], ...]:
    if not isinstance(found, dict):
        return ()
    made = ((shown, cell(found.get(key))) for key, shown in names.items())
    return tuple((shown, one) for shown, one in made if one is not None)


def cell(one: Any) -> Cell | None:
    """An Estimate's JSON as it is shown; None for anything else."""
    if not isinstance(one, dict) or number(one.get("value")) is None:
        return None
    ends = [float("nan") if one.get(end) is None else float(one[end]) for end in ("low", "high")]
    decimals = numbers.places(*ends) if ends[0] == ends[0] and ends[1] == ends[1] else 3
    return Cell(numbers.plain(float(one["value"]), decimals), numbers.interval(*ends))


def _short(text: Any) -> str:
    said = "" if text is None else str(text)
    return said if len(said) <= LONGEST else f"{said[:LONGEST]} …"
