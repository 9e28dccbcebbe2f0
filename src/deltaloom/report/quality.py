"""What was measured: every estimate by task and metric, sorted, and the comparisons worth making.

Compared are, on each task: models tuned alike on other data (with random data when there is some),
the best model with the second best, and everything with the reference that the measure step names
(else the base). Verdicts rest on the 95 % interval of the paired difference; Holm's correction
over all comparisons of one task stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Comparison, Estimate, compare, holm
from deltaloom.report.reading import Report, Step

LIKE, BEST, REFERENCE = "other data", "top two", "reference"
"""Why two models are compared: tuned alike on other data, the first two, against the reference."""


@dataclass(frozen=True)
class Row:
    """One model measured on one task."""

    label: str
    name: str
    """What the measure step calls it; the label may say more where names are not unique."""
    task: str
    estimate: Estimate
    product: Step | None
    """The step that made the model; None for the base and for models from elsewhere."""
    measured: Step

    @property
    def is_base(self) -> bool:
        """Whether this is the untouched base."""
        return self.name == "base"


@dataclass(frozen=True)
class Pair:
    """Two models compared item by item."""

    a: Row
    b: Row
    kind: str
    result: Comparison
    p_holm: float


@dataclass(frozen=True)
class Group:
    """All models measured on one task by one metric, the best first."""

    task: str
    metric: str
    better: str
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]


def groups(report: Report) -> list[Group]:
    """Every task and metric, in the order in which the runs name them."""
    found: dict[tuple[str, str], list[Row]] = {}
    for step in report.of_verb("measure"):
        for label, task, estimate in _estimates(step):
            rows = found.setdefault((task, estimate.metric), [])
            product = _product(report, step, label)
            shown = label if product is None else _name(report, product, label)
            row = Row(shown, label, task, estimate, product, step)
            _add(rows, row, report.label(step))
    return [_group(report, task, metric, rows) for (task, metric), rows in found.items()]


def sample(estimate: Estimate) -> str:
    """`240 items in 30 clusters`."""
    text = f"{estimate.n} item{'s' if estimate.n != 1 else ''}"
    if estimate.clusters:
        text += f" in {len(set(estimate.clusters.values()))} clusters"
    if estimate.seed_values:
        text += f" and {len(estimate.seed_values)} seeds"
    return text


def _estimates(step: Step) -> Iterator[tuple[str, str, Estimate]]:
    """Label, task and estimate of each finished measurement of a step, with items if it has."""
    labels = [_last(name) for name in step.names("deltas")] or ["base"]
    tasks = [Path(name).stem for name in step.names("tasks")]
    wanted = [(label, task) for task in tasks for label in labels]
    seen = set()
    folders = {path.parent.name: path for path in step.folder.glob("*--*/estimate.json")}
    others = [tuple(name.split("--", 1)) for name in sorted(folders)]
    known = {"--".join(pair) for pair in wanted}
    for label, task in [*wanted, *(pair for pair in others if "--".join(pair) not in known)]:
        estimate = _read(folders.get(f"{label}--{task}"))
        if estimate is not None:
            seen.add((label, task, estimate.metric))
            yield label, task, estimate
    for key, brief in step.results.get("estimates", {}).items():
        label, _, rest = key.partition("/")
        task, _, metric = rest.rpartition("/")
        if (label, task, metric) not in seen and (estimate := _restored(brief)) is not None:
            yield label, task, estimate


def _read(path: Path | None) -> Estimate | None:
    if path is None:
        return None
    try:
        return Estimate.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _restored(brief: Any) -> Estimate | None:
    """An estimate from its record without items: it can be shown, not compared."""
    try:
        return Estimate.from_json({**brief, "items": {}, "clusters": None, "weights": None})
    except (InputError, TypeError):
        return None


def _product(report: Report, step: Step, label: str) -> Step | None:
    for name in step.names("deltas"):
        if _last(name) == label:
            return report.find(name, step)
    # A measured base may itself be the product of an earlier step.
    return report.find(step.base, step) if label == "base" and step.base else None


def _name(report: Report, product: Step, label: str) -> str:
    return report.label(product) if product.name == label else label


def _last(name: str) -> str:
    return Path(name).name if "/" in name else name


def _add(rows: list[Row], row: Row, step: str) -> None:
    """Add a row; a repeated measurement is dropped, another one of the same name says whose."""
    for other in rows:
        if other.label == row.label:
            if other.estimate.to_json() == row.estimate.to_json():
                return
            row = replace(row, label=f"{row.label} ({step})")
    rows.append(row)


def _group(report: Report, task: str, metric: str, rows: list[Row]) -> Group:
    better = rows[0].estimate.better
    sign = -1 if better == "higher" else 1
    ranked = sorted(rows, key=lambda row: (sign * row.estimate.value, row.label))
    results: list[tuple[Row, Row, str, Comparison]] = []
    for a, b, kind in _wanted(report, ranked):
        try:
            results.append((a, b, kind, compare(a.estimate, b.estimate)))
        except InputError:
            continue
    adjusted = holm(result.p_value for *_, result in results)
    pairs = (
        Pair(a, b, kind, result, p)
        for (a, b, kind, result), p in zip(results, adjusted, strict=True)
    )
    return Group(task, metric, better, tuple(ranked), tuple(pairs))


def _wanted(report: Report, ranked: list[Row]) -> Iterator[tuple[Row, Row, str]]:
    """Pairs to compare, the telling ones first, each once; the better one stands first."""
    seen: set[frozenset[str]] = set()
    listed = [(a, b, LIKE) for a, b in _alike(report, ranked)]
    listed += [(ranked[0], ranked[1], BEST)] if len(ranked) > 1 else []
    for row in ranked:
        other = _reference(row, ranked)
        listed += [(row, other, REFERENCE)] if other is not None else []
    for a, b, kind in listed:
        key = frozenset((a.label, b.label))
        if len(key) == 2 and key not in seen:
            seen.add(key)
            yield (a, b, kind) if ranked.index(a) < ranked.index(b) else (b, a, kind)


def _reference(row: Row, ranked: list[Row]) -> Row | None:
    """What the measure step compares with, else the base; of the same run when it has one."""
    near = sorted(ranked, key=lambda one: one.measured.run != row.measured.run)
    for name in (row.measured.settings.get("compare"), "base"):
        found = next((one for one in near if one.name == name), None)
        if found is not None:
            return found
    return None


def _alike(report: Report, ranked: list[Row]) -> Iterator[tuple[Row, Row]]:
    """Models tuned by the same settings on other data, against the one tuned on random rows."""
    families: dict[str, list[Row]] = {}
    for row in ranked:
        if row.product is not None and row.product.verb == "tune":
            same = {k: v for k, v in row.product.settings.items() if k not in ("name", "data")}
            families.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(row)
    for family in families.values():
        against = [row for row in family if _is_random(report, row)] or family[:1]
        # Selected rows first: they answer what the selection was for.
        for row in sorted(family, key=lambda row: not _is_selected(report, row)):
            for other in against:
                if row is not other and _data(row) != _data(other):
                    yield row, other


def _data(row: Row) -> list[str]:
    return row.product.names("data") if row.product else []


def _is_random(report: Report, row: Row) -> bool:
    return _is_selected(report, row) and all(
        one is not None and one.method == "random" for one in _selections(report, row)
    )


def _is_selected(report: Report, row: Row) -> bool:
    made = _selections(report, row)
    return bool(made) and all(one is not None and one.verb == "select" for one in made)


def _selections(report: Report, row: Row) -> list[Step | None]:
    step = row.product
    return [report.find(name, step) for name in step.names("data")] if step else []
