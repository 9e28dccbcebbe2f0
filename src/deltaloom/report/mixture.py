"""Mixtures: each source's share before and after, and its measured effect with its interval."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from deltaloom.report import numbers
from deltaloom.report.reading import Report, Step, number
from deltaloom.report.svg import Interval

FILE = "weights.json"
RATINGS = {2: "helpful", 1: "somewhat helpful", 0: "no clear effect", -1: "harmful"}


@dataclass(frozen=True)
class Effect:
    """What steps on one source did for one target."""

    text: str
    rating: str


@dataclass(frozen=True)
class Source:
    """One line of the table."""

    name: str
    before: str
    after: str
    factor: str
    effects: tuple[Effect, ...]


@dataclass(frozen=True)
class Mixture:
    """One select step that weighed sources, the largest weights first."""

    label: str
    step: Step
    unit: str
    targets: tuple[str, ...]
    sources: tuple[Source, ...]
    charts: tuple[tuple[str, tuple[Interval, ...]], ...]
    """Target -> its sources' effects, the best first."""
    measure: str
    spent: str
    """Tokens that finding the weights took, and which part of the run they are for that may be."""


def mixtures(report: Report) -> list[Mixture]:
    """Every select step that left weights which can be read."""
    found = ((step, _weights(step)) for step in report.of_verb("select"))
    return [_mixture(report, step, record) for step, record in found if record is not None]


def _weights(step: Step) -> dict[str, Any] | None:
    """What the step recorded, or its file."""
    record: Any = step.results.get("weights")
    if record is None:
        try:
            record = json.loads((step.folder / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
    good = isinstance(record, dict) and isinstance(record.get("weights"), dict)
    return record if good and record["weights"] else None


def _mixture(report: Report, step: Step, record: dict[str, Any]) -> Mixture:
    about = _mapping(record.get("about"))
    weights = {str(name): number(one) or 0.0 for name, one in record["weights"].items()}
    before = {str(k): number(v) or 0.0 for k, v in _mapping(about.get("before")).items()}
    effects = _mapping(about.get("effects"))
    targets = tuple(sorted({target for own in effects.values() for target in _mapping(own)}))
    ranked = sorted(weights, key=lambda name: (-weights[name], name))
    sources = tuple(_source(name, weights, before, about, targets) for name in ranked)
    return Mixture(
        label=report.label(step),
        step=step,
        unit="tokens" if record.get("unit") == "tokens" else "rows",
        targets=targets,
        sources=sources,
        charts=tuple((target, _chart(effects, target)) for target in targets),
        measure=str(about.get("measure", "measure")),
        spent=_spent(step, number(_mapping(about.get("cost")).get("share"))),
    )


def _spent(step: Step, most: float | None) -> str:
    tokens = step.cost["forward_tokens"]
    if not tokens:
        return ""
    part = "" if most is None else f" (at most {numbers.share(most, 1)} of the run they are for)"
    return f"{numbers.short(tokens)} tokens{part}"


def _source(
    name: str,
    weights: dict[str, float],
    before: dict[str, float],
    about: dict[str, Any],
    targets: tuple[str, ...],
) -> Source:
    own = _mapping(_mapping(about.get("effects")).get(name))
    ratings = _mapping(_mapping(about.get("ratings")).get(name))
    effects = tuple(
        Effect(_text(_mapping(own.get(target))), _rating(ratings.get(target))) for target in targets
    )
    share = before.get(name)
    factor = numbers.times(weights[name] / share) if share else "–"
    shares = [numbers.share(one, 1) if one is not None else "–" for one in (share, weights[name])]
    return Source(name, shares[0], shares[1], factor, effects)


def _rating(value: Any) -> str:
    return RATINGS.get(value, "") if isinstance(value, int) else ""


def _text(effect: dict[str, Any]) -> str:
    value, low, high = _ends(effect)
    if value is None:
        return "–"
    return f"{numbers.signed(value, numbers.places(low, high))} {numbers.interval(low, high)}"


def _chart(effects: dict[str, Any], target: str) -> tuple[Interval, ...]:
    found = []
    for name, own in effects.items():
        value, low, high = _ends(_mapping(_mapping(own).get(target)))
        if value is not None:
            mark = "best" if low > 0 else ""
            text = _text(_mapping(_mapping(own).get(target)))
            found.append(Interval(str(name), value, low, high, text, mark))
    return tuple(sorted(found, key=lambda one: (-one.value, one.label)))


def _ends(effect: dict[str, Any]) -> tuple[float | None, float, float]:
    low, high = number(effect.get("low")), number(effect.get("high"))
    unknown = (-math.inf if low is None else low, math.inf if high is None else high)
    return (number(effect.get("value")), *unknown)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
