"""One self-contained HTML file about runs: everything in it, nothing loaded, no script needed."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from deltaloom.core.atomic import write_text
from deltaloom.core.errors import InputError
from deltaloom.report import (
    composition,
    concepts,
    cost,
    headline,
    judging,
    likeness,
    mixture,
    numbers,
    provenance,
    quality,
    searching,
    selection,
    stages,
    suspicion,
    svg,
    training,
)
from deltaloom.report.reading import STATUS, Report, read_runs

HERE = Path(__file__).parent


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write one HTML file about `runs`: a recipe's folder, or several single steps' folders.

    Raises InputError for a folder that is no run; failed and unfinished runs are shown as such.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out} is a folder; name the HTML file to write")
    page = render(read_runs(runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)


def render(report: Report) -> str:
    """The page's text: equal runs give equal bytes."""
    # Templates name every value they use; an undefined one is an error, never an empty cell.
    environment = Environment(
        loader=PackageLoader("deltaloom.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (HERE / "page.js").read_text(encoding="utf-8").strip()
    found = quality.groups(report)
    chosen = selection.selections(report)
    largest = max((share for one in chosen for share in one.shares), default=None)
    return environment.get_template("page.html.j2").render(
        title=" + ".join(run.name for run in report.runs[:3]),
        report=report,
        status=STATUS,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8").strip()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        headline=headline.headline(report, found),
        facts=_facts(report),
        groups=[_group(report, group) for group in found],
        ledger=cost.ledger(report),
        training=_training(report),
        likenesses=[(one, _alike(one)) for one in likeness.likenesses(report)],
        searches=[_search(one) for one in searching.searches(report)],
        selections=[_selection(one, largest) for one in chosen],
        mixtures=[_mixture(one) for one in mixture.mixtures(report)],
        staged=stages.staged(report),
        compositions=composition.compositions(report),
        conceptmixes=concepts.concepts(report),
        judgings=judging.judgings(report),
        suspicions=[_suspicion(one) for one in suspicion.suspicions(report)],
        inputs=provenance.inputs(report),
        versions=provenance.versions(report),
        replays=provenance.replays(report),
        settings=provenance.settings,
        reads=provenance.reads,
        last=provenance.last,
        numbers=numbers,
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    """What to know first: bases, steps, time, compute, tokens."""
    spent = cost.total(report.steps)
    bases = dict.fromkeys(
        provenance.last(step.base)
        for step in report.steps
        if step.base and report.find(step.base, step) is None
    )
    done = sum(step.status == "done" for step in report.steps)
    seeds = _seeds(report)
    return [
        ("Base", ", ".join(bases) or "none"),
        ("Steps", f"{done} of {len(report.steps)} done"),
        ("Wall time", numbers.seconds(spent["wall_seconds"])),
        ("Trained tokens", numbers.short(spent["backward_tokens"])),
        ("Compute", numbers.flops(spent["flops"])),
        ("Seed" if len(seeds) == 1 else "Seeds", ", ".join(map(str, seeds)) or "none"),
    ]


def _seeds(report: Report) -> list[int]:
    # A recipe's own record keeps seed 0; what counted are the steps'.
    found = {step.settings.get("seed", step.record.get("seed")) for step in report.steps}
    return sorted(seed for seed in found if isinstance(seed, int))


def _group(report: Report, group: quality.Group) -> dict[str, Any]:
    name = f"{group.metric} on {group.task}"
    base = next((row for row in group.rows if row.is_base), None)
    drawn = [
        svg.Interval(
            row.label, row.estimate.value, row.estimate.low, row.estimate.high, _value(row), mark
        )
        for row in group.rows
        for mark in ["base" if row.is_base else "best" if row is group.rows[0] else ""]
    ]
    best = group.rows[0]
    alt = (
        f"{name}, {len(group.rows)} models with their intervals; best: {best.label} {_value(best)}"
    )
    return {
        "name": name,
        "group": group,
        "chart": svg.intervals(drawn, base.estimate.value if base else None, alt),
        "rows": [(row, *_cells(row)) for row in group.rows],
        "levels": sorted({row.estimate.confidence for row in group.rows}),
        "pairs": [(pair, *_pair_cells(pair)) for pair in group.pairs],
        "scatter": _scatter(report, group, name),
    }


def _cells(row: quality.Row) -> tuple[str, str, str]:
    one = row.estimate
    value = numbers.plain(one.value, numbers.places(one.low, one.high))
    missing = f", {one.missing} missing" if one.missing else ""
    return value, numbers.interval(one.low, one.high), quality.sample(one) + missing


def _pair_cells(pair: quality.Pair) -> tuple[str, ...]:
    one = pair.result.difference
    decimals = numbers.places(one.low, one.high)
    detects = pair.result.mde
    return (
        numbers.signed(one.value, decimals),
        numbers.interval(one.low, one.high),
        numbers.probability(pair.result.p_value),
        numbers.probability(pair.p_holm),
        numbers.plain(detects, decimals) if math.isfinite(detects) else numbers.UNKNOWN,
        headline.verdict(pair),
    )


def _value(row: quality.Row) -> str:
    value, interval, items = _cells(row)
    return f"{value} {interval}, {items}"


def _scatter(report: Report, group: quality.Group, name: str) -> Markup | None:
    key, x_name, show = cost.axis(report)
    with_cost, free = cost.priced(report, group, key)
    if len(with_cost) < 2:
        return None
    points = [
        svg.Point(
            row.label,
            spent,
            row.estimate.value,
            row.estimate.low,
            row.estimate.high,
            f"{_value(row)}; {show(spent)}",
            "best" if row is group.rows[0] else "",
        )
        for row, spent in with_cost
    ]
    references = [(row.label, row.estimate.value) for row in free]
    alt = f"{name} against {x_name}, {len(points)} models"
    return svg.scatter(points, references, alt, x_name, group.metric)


def _training(report: Report) -> dict[str, Any] | None:
    found = training.training(report)
    if not found.losses:
        return None
    names = ", ".join(one.label for one in found.curves)
    return {
        "curves": found.curves,
        "loss": svg.lines(found.losses, f"Training loss of {names}", "optimizer step"),
        "evaluations": [
            (metric, svg.lines(series, f"{metric} while tuning", "optimizer step"))
            for metric, series in found.evaluations.items()
        ],
    }


def _alike(one: likeness.Likeness) -> Markup | None:
    drawn = [line.series for line in one.lines if line.series.points]
    if not drawn:
        return None
    names = ", ".join(line.label for line in one.lines)
    alt = f"CKA with {one.other} by layer on {one.task}, of {names}"
    return svg.lines(drawn, alt, "layer: embeddings, blocks, norm")


def _search(one: searching.Search) -> dict[str, Any]:
    charts = [
        (chart, svg.lines(chart.series, f"{chart.name}, {one.label}", chart.x_name))
        for chart in one.charts
    ]
    return {"of": one, "charts": charts}


def _selection(one: selection.Selection, largest: float | None) -> dict[str, Any]:
    chart = sources = None
    if one.scores is not None:
        chart = svg.histogram(
            one.scores.counts,
            one.scores.edges,
            one.scores.cut,
            f"Scores of {one.scores.rows} pool rows, {one.chosen} chosen",
            "score",
        )
    if one.sources:
        shares = iter(one.shares)
        bars = [
            svg.Bars(
                source.name,
                [
                    (next(shares), source.before_share),
                    (next(shares), source.after_share),
                ],
            )
            for source in one.sources
        ]
        sources = svg.bars(bars, f"Share of each source before and after {one.label}", largest)
    return {"of": one, "chart": chart, "sources": sources}


def _mixture(one: mixture.Mixture) -> dict[str, Any]:
    charts = [
        (target, svg.intervals(rows, 0.0, f"Effect of each source on {target}, best first"))
        for target, rows in one.charts
        if rows
    ]
    return {"of": one, "charts": charts}


def _suspicion(one: suspicion.Suspicion) -> dict[str, Any]:
    alt = f"Probability of a right label of {one.rows} rows, {one.below} below one half"
    parts = ("more likely wrong", "more likely right")
    chart = svg.histogram(one.counts, one.edges, 0.5, alt, "probability of a right label", parts)
    return {"of": one, "chart": chart if one.rows else None}
