"""The sentences on top, computed: who beats whom, by how much, or that no difference is shown."""

from __future__ import annotations

from dataclasses import dataclass

from deltaloom.report import numbers
from deltaloom.report.cost import product_cost
from deltaloom.report.quality import BEST, LIKE, REFERENCE, Group, Pair, sample
from deltaloom.report.reading import STATUS, Report

SHOWN = 6
"""Sentences under the headline; the rest is in the tables."""


@dataclass(frozen=True)
class Headline:
    """The main sentence and those beside it."""

    main: str
    shown: bool
    """Whether the main sentence rests on an interval that excludes zero."""
    others: tuple[str, ...] = ()
    more: int = 0


def headline(report: Report, found: list[Group]) -> Headline:
    """The first comparison that shows a difference leads; without one, that is what is said."""
    for kind in (LIKE, REFERENCE, BEST):
        told = [
            (pair, sentence(report, group, pair))
            for group in found
            for pair in group.pairs
            if pair.kind == kind
        ]
        if told:
            break
    else:
        return Headline(_without_pairs(report, found), False)
    first = next((i for i, (pair, _) in enumerate(told) if pair.result.favours != "neither"), 0)
    pair, main = told.pop(first)
    others = tuple(text for _, text in told[:SHOWN])
    return Headline(main, pair.result.favours != "neither", others, max(0, len(told) - SHOWN))


def sentence(report: Report, group: Group, pair: Pair) -> str:
    """One comparison in words, the better model first."""
    difference, metric = pair.result.difference, group.metric
    low, high, value = difference.low, difference.high, difference.value
    a, b = pair.a, pair.b
    if pair.result.favours == "b":
        a, b, low, high, value = b, a, -high, -low, -value
    decimals = numbers.places(low, high)
    over = f"paired over {sample(difference)}"
    if pair.result.unit == "seeds":
        over = f"paired over {len(difference.seed_values)} seeds"
    gap = f"{numbers.signed(value, decimals)} {metric} {numbers.interval(low, high)}, {over}"
    if group.better == "lower":
        gap += "; lower is better"
    if pair.result.favours == "neither":
        return f"No difference shown between {a.label} and {b.label} on {group.task}: {gap}."
    text = f"{a.label} beats {b.label} on {group.task}: {gap}"
    return f"{text}{_price(report, pair, a.label)}."


def verdict(pair: Pair) -> str:
    """The verdict of one comparison in a few words."""
    better = {"a": pair.a.label, "b": pair.b.label}.get(pair.result.favours)
    if better is None:
        return "no difference shown"
    corrected = "" if pair.p_holm <= 0.05 else " (not after correction)"
    return f"{better} is better{corrected}"


def _price(report: Report, pair: Pair, winner: str) -> str:
    spent = [product_cost(report, row.product) for row in (pair.a, pair.b)]
    if spent[0] is None or spent[1] is None:
        return ""
    ours, theirs = (one["flops"] for one in spent)
    if pair.a.label != winner:
        ours, theirs = theirs, ours
    if not (ours > 0 and theirs > 0):
        return ""
    ratio = ours / theirs
    if 0.95 <= ratio <= 1.05:
        return ", for the same compute"
    return f", for {ratio:.2g}× the compute, selection included"


def _without_pairs(report: Report, found: list[Group]) -> str:
    broken = [step for step in report.steps if step.status != "done"]
    if found:
        row = found[0].rows[0]
        one = row.estimate
        value = numbers.plain(one.value, numbers.places(one.low, one.high))
        return (
            f"{row.label} on {row.task}: {one.metric} {value} "
            f"{numbers.interval(one.low, one.high)} over {sample(one)}; "
            "there is nothing to compare it with."
        )
    if broken:
        step = broken[0]
        return (
            f"Nothing was measured: {step.name} ({step.verb} {step.method}) "
            f"is {STATUS.get(step.status, step.status)}."
        )
    done = len(report.steps)
    return f"{done} step{'s' if done != 1 else ''} done; nothing was measured."
