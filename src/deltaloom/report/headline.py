"""The sentences on top, computed: who beats whom, by how much, or that no difference is shown."""

from __future__ import annotations

from dataclasses import dataclass

from deltaloom.report import numbers
from deltaloom.report.cost import product_cost
from deltaloom.report.quality import BEST, LIKE, REFERENCE, Group, Pair, sample
from deltaloom.report.reading import Report

SHOWN = 5
"""Sentences under the headline; the rest is in the tables."""

ENDINGS = {
    "failed": "failed",
    "interrupted": "was interrupted",
    "running": "is not finished",
    "missing": "was not started",
    "unreadable": "cannot be read",
}
"""How a step without a result ended, as a verb."""


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
        told = [(group, pair) for group in found for pair in group.pairs if pair.kind == kind]
        if told:
            break
    else:
        return Headline(_without_pairs(report, found), False)
    first = next((i for i, (_, one) in enumerate(told) if one.result.favours != "neither"), 0)
    told.insert(0, told.pop(first))
    texts, priced = [], set()
    for group, pair in told[: SHOWN + 1]:
        # The price of two models is the same on every task: it is said once.
        models = frozenset((pair.a.label, pair.b.label))
        price = "" if models in priced else _price(report, pair)
        if pair.result.favours != "neither":
            priced.add(models)
        texts.append(sentence(group, pair, price))
    shown = told[0][1].result.favours != "neither"
    return Headline(texts[0], shown, tuple(texts[1:]), max(0, len(told) - SHOWN - 1))


def sentence(group: Group, pair: Pair, price: str = "") -> str:
    """One comparison in words, the better model first; `price` is added to a difference shown."""
    difference, metric = pair.result.difference, group.metric
    low, high, value = difference.low, difference.high, difference.value
    a, b = pair.a, pair.b
    if pair.result.favours == "b":
        a, b, low, high, value = b, a, -high, -low, -value
    decimals = numbers.places(low, high)
    over = f"paired over {sample(difference)}"
    if pair.result.unit == "seeds":
        over = f"paired over {len(difference.seed_values)} seeds"
    lower = " (lower is better)" if group.better == "lower" else ""
    gap = f"{numbers.signed(value, decimals)} {metric} {numbers.interval(low, high)}{lower}, {over}"
    if pair.result.favours == "neither":
        return f"No difference shown between {a.label} and {b.label} on {group.task}: {gap}."
    if pair.p_holm > 0.05:
        gap += f", though not after correcting for {len(group.pairs)} comparisons"
    return f"{a.label} beats {b.label} on {group.task}: {gap}{price}."


def verdict(pair: Pair) -> str:
    """The verdict of one comparison in a few words."""
    better = {"a": pair.a.label, "b": pair.b.label}.get(pair.result.favours)
    if better is None:
        return "no difference shown"
    corrected = "" if pair.p_holm <= 0.05 else " (not after correction)"
    return f"{better} is better{corrected}"


def _price(report: Report, pair: Pair) -> str:
    """The compute of the better model as a multiple of the other's."""
    better, other = (pair.b, pair.a) if pair.result.favours == "b" else (pair.a, pair.b)
    ours = product_cost(report, better.product)
    theirs = product_cost(report, other.product)
    if ours is None or theirs is None or not (ours["flops"] > 0 and theirs["flops"] > 0):
        return ""
    ratio = ours["flops"] / theirs["flops"]
    if 0.95 <= ratio <= 1.05:
        return ", for the same compute"
    much = numbers.times(ratio) if ratio > 1 else f"{numbers.share(ratio, 1)} of"
    return f", for {much} the compute, selection included"


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
            f"{ENDINGS.get(step.status, step.status)}."
        )
    done = len(report.steps)
    return f"{done} step{'s' if done != 1 else ''} done; nothing was measured."
