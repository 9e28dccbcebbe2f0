"""Charts as inline SVG, there without any script.

Horizontal places are percentages and vertical ones pixels, so a chart fills whatever width it is
given while its text keeps its size. Each chart's `<svg>` is the plotting area alone; axis labels
stand in its CSS margins. Colours are CSS classes; `<title>` gives tooltips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from deltaloom.report.axes import Scale, cut, figure, grid_x, grid_y, line, percent
from deltaloom.report.labels import free_end, label_places
from deltaloom.report.numbers import tick

COLOURS = 6
"""Distinct series colours (`.c0` to `.c5`); further series repeat them with dashes."""


@dataclass(frozen=True)
class Interval:
    """A row of `intervals`: infinite ends are drawn to the edge."""

    label: str
    value: float
    low: float
    high: float
    text: str
    mark: str = ""
    """CSS class: `best`, `base` or none."""


@dataclass(frozen=True)
class Series:
    """A line of `lines`, or with `dots` its single measurements too."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Point:
    """A mark of `scatter`."""

    label: str
    x: float
    y: float
    low: float
    high: float
    text: str
    mark: str = ""


@dataclass(frozen=True)
class Bars:
    """A group of `bars`: one bar a value, in the order of the legend."""

    label: str
    values: Sequence[tuple[float, str]]


def intervals(rows: Sequence[Interval], reference: float | None, name: str) -> Markup:
    """One dot with its interval a row, on a common axis; `reference` is a dashed line."""
    ends = [end for row in rows for end in (row.value, row.low, row.high) if math.isfinite(end)]
    scale = Scale.around(ends)
    height = 38 * len(rows) + 2
    body = [grid_x(scale, height, tick)]
    if reference is not None:
        body.append(line(scale(reference), 0, scale(reference), height, "reference"))
    for number, row in enumerate(rows):
        top, y = 38 * number + 15, 38 * number + 27
        left = scale(row.low) if math.isfinite(row.low) else 0.0
        right = scale(row.high) if math.isfinite(row.high) else 100.0
        whiskers = "".join(
            line(at, y - 4, at, y + 4)
            for at, end in ((left, row.low), (right, row.high))
            if math.isfinite(end)
        )
        body.append(
            f'<g class="row {row.mark}"><title>{escape(f"{row.label}: {row.text}")}</title>'
            f'<rect class="hit" x="0" y="{38 * number}" width="100%" height="38"/>'
            f'<text class="name" x="0" y="{top}">{escape(cut(row.label, 34))}</text>'
            f"{line(0, y, 100, y, 'grid')}{line(left, y, right, y)}{whiskers}"
            f'<circle cx="{percent(scale(row.value))}" cy="{y}" r="5"/></g>'
        )
    return figure(name, height, "".join(body), left=2)


def lines(series: Sequence[Series], name: str, x_name: str, height: int = 220) -> Markup:
    """Lines over a common horizontal axis."""
    across = Scale.around([x for one in series for x, _ in one.points], pad=0.0)
    up = Scale.around([y for one in series for _, y in one.points])
    body = [grid_x(across, height, tick), grid_y(up, height)]
    # A box of its own stretches to the width; its strokes do not stretch with it.
    for one in series:
        at = [(across(x), height * (1 - up(y) / 100)) for x, y in one.points]
        path = " ".join(f"{10 * x:.1f},{y:.1f}" for x, y in at)
        last = one.points[-1][1]
        kind = f"c{one.colour % COLOURS}"
        kind += " dashed" * (one.colour >= COLOURS) + " faint" * one.faint
        title = f"<title>{escape(f'{one.label}: {last:.4g} at the end')}</title>"
        body.append(
            f'<svg x="0" y="0" width="100%" height="{height}" viewBox="0 0 1000 {height}" '
            f'preserveAspectRatio="none"><polyline class="{kind}" points="{path}">{title}'
            "</polyline></svg>"
        )
        if one.dots or len(at) == 1:
            body.extend(
                f'<circle class="{kind}" cx="{percent(x)}" cy="{y:.1f}" r="4"><title>'
                f"{escape(f'{one.label}: {value:.4g} at {tick(step)}')}</title></circle>"
                for (x, y), (step, value) in zip(at, one.points, strict=True)
            )
    return figure(name, height, "".join(body), left=52, x_name=x_name)


def bars(rows: Sequence[Bars], name: str, largest: float | None = None) -> Markup:
    """Horizontal bars in groups, each with its text at its end."""
    most = largest or max((value for row in rows for value, _ in row.values), default=1.0) or 1.0
    body, y = [], 0
    for row in rows:
        label = escape(cut(row.label, 44))
        body.append(f'<text class="name" x="0" y="{y + 13}">{label}</text>')
        y += 19
        for number, (value, text) in enumerate(row.values):
            # The last fifth is kept for the text.
            width = 80 * min(1.0, max(0.0, value / most))
            title = escape(f"{row.label}: {text}")
            body.append(
                f'<g class="bar b{number}"><title>{title}</title>'
                f'<rect x="0" y="{y}" width="{percent(width)}" height="12" rx="2"/>'
                f'<text x="{percent(width)}" dx="6" y="{y + 10}">{escape(text)}</text></g>'
            )
            y += 15
        y += 9
    return figure(name, y, "".join(body), left=2, foot=4)


def scatter(
    points: Sequence[Point],
    references: Sequence[tuple[str, float]],
    name: str,
    x_name: str,
    y_name: str,
    height: int = 260,
) -> Markup:
    """Labelled points with vertical intervals; horizontal reference lines; cost may be log."""
    xs = [point.x for point in points]
    logarithmic = min(xs) > 0 and max(xs) / min(xs) > 8
    ends = [end for p in points for end in (p.y, p.low, p.high) if math.isfinite(end)]
    up = Scale.around([*ends, *(value for _, value in references)], pad=0.08)
    across = Scale.around(xs, pad=0.12, log=logarithmic)
    body = [grid_x(across, height, tick), grid_y(up, height)]
    spots = [
        (across(p.x), _y(up, p.y, height), _y(up, p.high, height), _y(up, p.low, height))
        for p in points
    ]
    names = [cut(point.label, 24) for point in points]
    taken = []
    for label, value in references:
        y, text = _y(up, value, height), cut(label, 24)
        anchor, box = free_end(spots, text, y - 5)
        taken.append(box)
        x, shift = (0, 4) if anchor == "start" else (100, -4)
        body.append(
            f'{line(0, y, 100, y, "reference")}<text class="name quiet" x="{x}%" dx="{shift}" '
            f'y="{y - 5:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
        )
    places = label_places(spots, names, height, taken)
    for point, spot, name_of, place in zip(points, spots, names, places, strict=True):
        x, y, top, foot = spot
        shift, at, anchor = place
        body.append(
            f'<g class="row {point.mark}"><title>{escape(f"{point.label}: {point.text}")}</title>'
            f'{line(x, top, x, foot, "thin")}<circle cx="{percent(x)}" cy="{y:.1f}" r="5"/>'
            f'<text class="name" x="{percent(x)}" dx="{shift}" y="{at:.1f}" '
            f'text-anchor="{anchor}">{escape(name_of)}</text></g>'
        )
    note = " (log scale)" if logarithmic else ""
    return figure(name, height, "".join(body), left=52, x_name=x_name + note, y_name=y_name)


def histogram(
    counts: Sequence[tuple[int, int]],
    edges: Sequence[float],
    limit: float | None,
    name: str,
    x_name: str,
    parts: tuple[str, str] = ("chosen", "not"),
    height: int = 180,
) -> Markup:
    """Stacked counts of two parts per bin of `edges`; `limit` is a vertical line."""
    across = Scale(edges[0], edges[-1])
    most = max(chosen + rest for chosen, rest in counts) or 1
    up = Scale(0.0, most * 1.08)
    body = [grid_y(up, height), grid_x(across, height, tick)]
    for (chosen, rest), low, high in zip(counts, edges, edges[1:], strict=False):
        x, wide = across(low), across(high) - across(low)
        title = escape(f"{tick(low)} to {tick(high)}: {chosen} {parts[0]}, {rest} {parts[1]}")
        foot = height * (1 - up(chosen) / 100)
        top = height * (1 - up(chosen + rest) / 100)
        body.append(
            f'<g class="bin"><title>{title}</title>'
            f'<rect class="b1" x="{percent(x)}" y="{foot:.1f}" width="{percent(wide * 0.94)}" '
            f'height="{height - foot:.1f}"/>'
            f'<rect class="b0" x="{percent(x)}" y="{top:.1f}" width="{percent(wide * 0.94)}" '
            f'height="{foot - top:.1f}"/></g>'
        )
    if limit is not None:
        x = across(limit)
        body.append(line(x, 0, x, height, "cut"))
        anchor, shift = ("end", -5) if x > 60 else ("start", 5)
        body.append(
            f'<text class="name" x="{percent(x)}" dx="{shift}" y="12" text-anchor="{anchor}">'
            f"cut {tick(float(f'{limit:.3g}'))}</text>"
        )
    return figure(name, height, "".join(body), left=52, x_name=x_name, y_name="rows")


def _y(scale: Scale, value: float, height: int) -> float:
    """Pixels from the top; what is not finite lies at the edge."""
    if not math.isfinite(value):
        return 0.0 if value > 0 else float(height)
    return height * (1 - scale(value) / 100)
