"""Labels that tuning found suspicious: how sure it is of all, and the rows to look at first."""

from __future__ import annotations

from dataclasses import dataclass

from deltaloom.core.errors import InputError
from deltaloom.core.features import Features
from deltaloom.report import numbers
from deltaloom.report.reading import Report, Step, json_lines, number
from deltaloom.report.selection import SHOWN, Chosen, shown_row

BINS = 20
SUSPICIOUS = "suspicious.jsonl"


@dataclass(frozen=True)
class Suspect:
    """One row of the table."""

    row: Chosen
    loss: float | None
    predicted: str
    """The model's own answer, where it is a class."""


@dataclass(frozen=True)
class Suspicion:
    """One tune step that judged the labels of its rows."""

    label: str
    step: Step
    suspects: tuple[Suspect, ...]
    below: int
    """Rows whose label is more likely wrong than right."""
    rows: int
    counts: tuple[tuple[int, int], ...]
    """By probability of a right label: rows below one half, and others."""
    problem: str | None

    @property
    def edges(self) -> tuple[float, ...]:
        """Borders of the probabilities counted together."""
        return tuple(k / BINS for k in range(BINS + 1))

    @property
    def share(self) -> str:
        """Part of the rows that is below one half."""
        return numbers.share(self.below, self.rows)


def suspicions(report: Report) -> list[Suspicion]:
    """Every tune step that left judgements of its rows."""
    return [
        _suspicion(report, step)
        for step in report.of_verb("tune")
        if (step.folder / SUSPICIOUS).exists()
    ]


def _suspicion(report: Report, step: Step) -> Suspicion:
    suspects, below = [], 0
    for below, raw in enumerate(json_lines(step.folder / SUSPICIOUS), 1):
        if below <= SHOWN:
            loss, predicted = number(raw.pop("loss", None)), raw.pop("predicted", None)
            said = "" if predicted is None else str(predicted)
            suspects.append(Suspect(shown_row(below, raw), loss, said))
    counts, problem = [[0, 0] for _ in range(BINS)], None
    try:
        scores = Features.open(step.folder / "scores").index["score"]
        for value in (one for one in map(number, scores) if one is not None):
            place = min(BINS - 1, max(0, int(value * BINS)))
            counts[place][0 if value < 0.5 else 1] += 1
    except (InputError, KeyError, TypeError, ValueError) as error:
        problem = f"The judgements cannot be read: {error}"
    return Suspicion(
        label=report.label(step),
        step=step,
        suspects=tuple(suspects),
        below=below,
        rows=sum(map(sum, counts)),
        counts=tuple((a, b) for a, b in counts),
        problem=problem,
    )
