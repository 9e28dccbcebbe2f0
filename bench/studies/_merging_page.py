"""The tables and curves of `merging_at_scale.py`, written into the page between two marks.

A row has `size`, `quality`, `count`, `method` and two Estimates, `held_in` and `held_out`.
"""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from deltaloom.core.run import versions
from deltaloom.report.axes import Scale, grid_x, grid_y, line, percent
from deltaloom.report.numbers import seconds

HOME = Path(__file__).parents[2] / "docs" / "studies"
PAGE = HOME / "merging_at_scale.md"
MARKS = ("<!-- made by bench/studies/merging_at_scale.py -->", "<!-- end of what is made -->")
COLOURS = ("#0072b2", "#c4500a", "#00805c", "#a8457e", "#45484d", "#86690a")
WIDTH, PANEL, HEIGHT = 760, 300, 170
STYLE = (
    "svg{overflow:visible}text{font:12px system-ui,sans-serif;fill:#555}"
    ".title{font-size:13px;font-weight:600;fill:#222}"
    ".grid{stroke:#ddd;stroke-width:1}.reference{stroke:#777;stroke-dasharray:4 3}"
)


def write_page(rows: list[Any], raw: dict, cpu_seconds: float, date: str) -> None:
    """Write curves and figures beside the page, and the tables into it."""
    for metric in ("held_in", "held_out"):
        (HOME / f"merging_at_scale_{metric}.svg").write_text(curves(rows, metric), "utf-8")
    figures = [
        {
            "size": row.size,
            "quality": row.quality,
            "experts": row.count,
            "method": row.method,
            "held_in": dict(row.held_in.items),
            "held_out": dict(row.held_out.items),
        }
        for row in rows
    ]
    record = {"date": date, "cpu_seconds": cpu_seconds, "accuracies": raw, "rows": figures}
    path = HOME / "merging_at_scale.json"
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    used = ", ".join(f"{k} {v}" for k, v in versions().items() if k in ("python", "torch"))
    told = (
        f"`python bench/studies/merging_at_scale.py`, {date}, {os.cpu_count()} cores "
        f"(one thread a base), {used}; {seconds(cpu_seconds)} of CPU time beside the small base's "
        "pretraining."
    )
    made = [MARKS[0], told, "", *plain(raw), *table(rows, "held_in"), *table(rows, "held_out")]
    text = PAGE.read_text("utf-8")
    head, _, rest = text.partition(MARKS[0])
    _, _, foot = rest.partition(MARKS[1])
    PAGE.write_text(head + "\n".join([*made, MARKS[1]]) + foot, "utf-8")


def plain(raw: dict) -> list[str]:
    """Accuracies that the scores are divided by."""
    tasks = list(next(iter(raw.values()))["base"])
    lines = ["| accuracy | " + " | ".join(tasks) + " |", "|---|" + "---|" * len(tasks)]
    for name, found in raw.items():
        for who in ("base", "expert"):
            cells = (f"{found[who][t]:.2f}" if t in found[who] else "" for t in tasks)
            lines.append(f"| {name.replace('-', ', ')}: {who} | {' | '.join(cells)} |")
    return [*lines, ""]


def table(rows: list[Any], metric: str) -> list[str]:
    """One line a base and method, one column a number of experts."""
    counts = sorted({row.count for row in rows})
    title = "Held-in, over the expert's" if metric == "held_in" else "Held-out, over the base's"
    lines = [f"| {title} | method | " + " | ".join(f"{c} experts" for c in counts) + " |"]
    lines.append("|---|---|" + "---|" * len(counts))
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        if metric == "held_out" and row.method == "base":
            continue  # one by definition
        key = (f"{row.size}, {row.quality}", row.method)
        cells.setdefault(key, {})[row.count] = text(getattr(row, metric))
    for (base, method), found in cells.items():
        lines.append(f"| {base} | {method} | {' | '.join(found[c] for c in counts)} |")
    return [*lines, ""]


def spread(one: Any) -> bool:
    """Whether the choices differ: equal scores are no sample of a proportion, whatever they are."""
    return len(set(one.items.values())) > 1


def text(one: Any) -> str:
    """Value and interval; a single choice has none, and equal ones need none."""
    if not spread(one):
        return f"{one.value:.2f}"
    return f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"


def curves(rows: list[Any], metric: str) -> str:
    """Four panels, one a base, on common axes; whiskers are the intervals over choices."""
    bases = list(dict.fromkeys((row.size, row.quality) for row in rows))
    drawn = [row for row in rows if row.method != "base" or metric == "held_in"]
    methods = list(dict.fromkeys(row.method for row in drawn))
    across = Scale.around([row.count for row in drawn], pad=0.06)
    up = Scale.around([getattr(row, metric).value for row in drawn], pad=0.15)
    parts = [legend(methods)]
    for number, base in enumerate(bases):
        x = 50 + (number % 2) * (PANEL + 60)
        y = 60 + (number // 2) * (HEIGHT + 60)
        own = [row for row in drawn if (row.size, row.quality) == base]
        body = panel(own, methods, metric, across, up)
        parts.append(
            f'<text class="title" x="{x}" y="{y - 8}">{base[0]}, {base[1]} base</text>'
            f'<svg x="{x}" y="{y}" width="{PANEL}" height="{HEIGHT}">{body}</svg>'
            f'<text x="{x + PANEL}" y="{y + HEIGHT + 32}" text-anchor="end">experts merged</text>'
        )
    tall = 60 + (len(bases) + 1) // 2 * (HEIGHT + 60)
    title = f"{metric.replace('_', '-')} scores by number of experts"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{tall}" role="img" '
        f'aria-label="{title}"><style>{STYLE}</style>'
        f'<rect width="{WIDTH}" height="{tall}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def legend(methods: list[str]) -> str:
    """The methods' names beside their colours, in a line."""
    found, x = [], 50
    for method, colour in zip(methods, COLOURS, strict=False):
        found.append(
            f'<circle cx="{x}" cy="20" r="5" fill="{colour}"/>'
            f'<text x="{x + 9}" y="24">{method}</text>'
        )
        x += 30 + 7 * len(method)
    return "".join(found)


def panel(rows: list[Any], methods: list[str], metric: str, across: Scale, up: Scale) -> str:
    """The lines of one base, side by side by a pixel or two so that whiskers can be told apart."""
    body = [grid_x(across, HEIGHT, lambda v: f"{v:g}"), grid_y(up, HEIGHT)]
    one = HEIGHT * (1 - up(1.0) / 100)
    body.append(line(0, one, 100, one, "reference"))
    for number, (method, colour) in enumerate(zip(methods, COLOURS, strict=False)):
        own = [row for row in rows if row.method == method]
        shift = 0.8 * (number - len(methods) / 2)
        points = []
        for row in own:
            found = getattr(row, metric)
            x, y = across(row.count) + shift, HEIGHT * (1 - up(found.value) / 100)
            points.append((x, y))
            if spread(found) and method not in ("multitask", "base"):
                top, foot = (
                    HEIGHT * (1 - min(max(up(end), 0), 100) / 100)
                    for end in (found.high, found.low)
                )
                body.append(line(x, top, x, foot).replace("<line", f'<line stroke="{colour}"'))
            body.append(f'<circle cx="{percent(x)}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        for (x1, y1), (x2, y2) in pairwise(points):
            body.append(
                line(x1, y1, x2, y2).replace(
                    "<line", f'<line stroke="{colour}" stroke-width="1.75"'
                )
            )
    return "".join(body)
