"""What was selected: rows to read, sources before and after, and the scores of the whole pool."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from deltaloom.core.errors import InputError
from deltaloom.core.examples import Example, parse
from deltaloom.core.features import Features
from deltaloom.report import numbers
from deltaloom.report.reading import Report, Step, json_lines, number

SHOWN = 200
"""Rows shown of each selection; the rest is counted."""
LONGEST = 1500
"""Characters shown of one text."""
BRIEF = 140
"""Characters of a text that stand outside `<details>`."""
SOURCES = 12
"""Sources shown one by one; the rest is added up."""
BINS = 30


@dataclass(frozen=True)
class Chosen:
    """One row of the table."""

    rank: int
    id: str
    source: str
    score: float | None
    reason: str
    parts: tuple[tuple[str, str], ...]
    """Role and text of each part."""
    brief: str
    """One line, when the parts are too long to stand in the table as they are."""


@dataclass(frozen=True)
class Source:
    """One source's rows and shares, before and after."""

    name: str
    before: int
    after: int
    before_share: str
    after_share: str
    lift: str


@dataclass(frozen=True)
class Scores:
    """The pool's score histogram, chosen and not, and where the cut is if there is one."""

    counts: tuple[tuple[int, int], ...]
    edges: tuple[float, ...]
    cut: float | None
    rows: int


@dataclass(frozen=True)
class Selection:
    """One select step."""

    label: str
    step: Step
    chosen: int
    pool: int | None
    rows: tuple[Chosen, ...]
    sources: tuple[Source, ...]
    totals: tuple[int, int]
    scores: Scores | None
    problem: str | None

    @property
    def shares(self) -> list[float]:
        """Each source's share of the pool and of the chosen rows."""
        before, after = (max(1, total) for total in self.totals)
        return [x for one in self.sources for x in (one.before / before, one.after / after)]


def selections(report: Report) -> list[Selection]:
    """Every select step that left rows."""
    return [_selection(report, step) for step in report.of_verb("select") if step.record]


def _selection(report: Report, step: Step) -> Selection:
    rows, ids, sources, problem = [], set(), Counter(), None
    path = step.folder / "selected.jsonl"
    for rank, raw in enumerate(json_lines(path), 1):
        ids.add(str(raw.get("id")))
        sources[str(raw.get("source"))] += 1
        if rank <= SHOWN:
            rows.append(shown_row(rank, raw))
    scores = None
    if (step.folder / "scores").exists():
        try:
            scores = _scores(Features.open(step.folder / "scores"), ids)
        except (InputError, KeyError, TypeError, ValueError) as error:
            problem = f"The scores cannot be read: {error}"
    after = _counts(step.results.get("selected_sources")) or sources
    before = _counts(step.results.get("pool_sources"))
    pool = step.results.get("pool_rows")
    return Selection(
        label=report.label(step),
        step=step,
        chosen=len(ids),
        pool=pool if isinstance(pool, int) else None,
        rows=tuple(rows),
        sources=_sources(before, after) if before else (),
        totals=(sum(before.values()), sum(after.values())),
        scores=scores,
        problem=problem,
    )


def _counts(value: Any) -> Counter[str]:
    found = value.items() if isinstance(value, dict) else ()
    return Counter({str(name): n for name, n in found if isinstance(n, int) and n > 0})


def shown_row(rank: int, raw: dict[str, Any]) -> Chosen:
    """One line of a JSONL file of rows, as its table shows it."""
    score, reason = raw.get("score"), raw.get("reason")
    rest = {key: value for key, value in raw.items() if key not in ("score", "reason")}
    try:
        row = parse("selected.jsonl", "", rest)
        parts, identity, source = _parts(row), row.id, row.source
    except InputError:
        parts, identity, source = (("", str(rest)),), str(raw.get("id")), str(raw.get("source"))
    shown = tuple((role, _trimmed(text)) for role, text in parts)
    line = " → ".join(" ".join(text.split()) for _, text in parts)
    long = len(line) > BRIEF or sum(text.count("\n") for _, text in parts) > 3
    return Chosen(
        rank=rank,
        id=identity,
        source=source,
        score=number(score),
        reason="" if reason is None else _trimmed(str(reason)),
        parts=shown,
        brief=f"{line[:BRIEF].rpartition(' ')[0] or line[:BRIEF]} …" if long else "",
    )


def _parts(row: Example) -> tuple[tuple[str, str], ...]:
    if row.messages is not None:
        return tuple((turn["role"], turn["content"]) for turn in row.messages)
    if row.prompt is not None:
        answer = row.response
        return (("prompt", row.prompt), *((("response", answer),) if answer is not None else ()))
    return (("text", row.text or ""),)


def _trimmed(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}… ({numbers.count(len(text))} characters in all)"


def _sources(before: Counter[str], after: Counter[str]) -> tuple[Source, ...]:
    """The sources that are large before or after, in the pool's order, and the rest added up."""
    names = sorted({*before, *after}, key=lambda name: (-after[name], -before[name], name))
    all_before, all_after = sum(before.values()), sum(after.values())
    most = len(names) if len(names) <= SOURCES else SOURCES - 1
    kept, rest = names[:most], names[most:]
    other = f"{len(rest)} other sources"
    if rest:
        before, after = Counter(before), Counter(after)
        before[other], after[other] = (sum(c[name] for name in rest) for c in (before, after))
    # One order for all selections of a pool, so that their charts can be read side by side.
    names = [*sorted(kept, key=lambda name: (-before[name], name)), *([other] if rest else [])]
    found = []
    for name in names:
        share = before[name] / all_before if all_before else 0.0
        now = after[name] / all_after if all_after else 0.0
        found.append(
            Source(
                name,
                before[name],
                after[name],
                numbers.share(before[name], all_before),
                numbers.share(after[name], all_after),
                numbers.times(now / share) if share else "–",
            )
        )
    return tuple(found)


def _scores(store: Features, ids: set[str]) -> Scores | None:
    pairs = [
        (value, identity in ids)
        for identity, value in zip(store.ids, map(number, store.index["score"]), strict=True)
        if value is not None
    ]
    if not pairs:
        return None
    low, high = min(pairs)[0], max(pairs)[0]
    if not high > low:
        low, high = low - 0.5, high + 0.5
    cut, width = _cut(pairs), (high - low) / BINS
    # The cut is an edge, so that no bin holds rows from both its sides.
    start = low if cut is None else cut - math.ceil((cut - low) / width - 1e-9) * width
    bins = math.ceil((high - start) / width + 1e-9)
    counts = [[0, 0] for _ in range(bins)]
    for value, is_chosen in pairs:
        place = math.floor((value - start) / width + 1e-9)
        counts[min(bins - 1, max(0, place))][0 if is_chosen else 1] += 1
    edges = tuple(start + k * width for k in range(bins + 1))
    return Scores(tuple((a, b) for a, b in counts), edges, cut, len(pairs))


def _cut(pairs: list[tuple[float, bool]]) -> float | None:
    """The score that parts chosen from not, when one does; selections need not be a cut."""
    chosen = [value for value, is_chosen in pairs if is_chosen]
    others = [value for value, is_chosen in pairs if not is_chosen]
    if not chosen or not others:
        return None
    if min(chosen) >= max(others):
        return min(chosen)
    return max(chosen) if max(chosen) <= min(others) else None
