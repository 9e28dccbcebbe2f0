"""From marks to numbers: estimates per k and skill, and how much of composing is lost.

Composition efficiency at k is the full-marks ratio over what independent skills would give, the
mean over the asked combinations of the product of their skills' single (k = 1) ratios. 1 is
"composing costs nothing"; 0 with good single ratios is "knows the skills and cannot compose".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaloom.core.estimate import Estimate
from deltaloom.measure._combinations import Combination
from deltaloom.measure._rubric import METRICS

RESAMPLES = 2000
"""Bootstrap resamples of an efficiency's interval. Ours."""


@dataclass(frozen=True)
class Marked:
    """One combination with its marks: means over rounds, the best round, its skills' points."""

    asked: Combination
    mean: Mapping[str, float]
    best: Mapping[str, float]
    points: Mapping[str, float]
    """By skill, the mean point over the rounds."""


def estimate(
    marked: Sequence[Marked],
    metric: str,
    *,
    missing: int,
    best: bool = False,
    cost: Mapping[str, float] | None = None,
) -> Estimate | None:
    """The mean of one metric, clustered by set of skills; None where nothing could be scored."""
    if not marked:
        return None
    items = {one.asked.id: (one.best if best else one.mean)[metric] for one in marked}
    clusters = {one.asked.id: one.asked.cluster for one in marked}
    # One set of skills for all, or one for each: neither tells which belong together.
    grouped = 1 < len({*clusters.values()}) < len(clusters)
    return Estimate.from_items(
        items,
        metric=f"best_{metric}" if best else metric,
        clusters=clusters if grouped else None,
        missing=missing,
        cost=cost,
    )


def by_k(
    marked: Sequence[Marked], planned: Mapping[int, int], rounds: int
) -> dict[int, dict[str, Estimate]]:
    """Every metric at every k; with several rounds, the best round's beside the mean."""
    found: dict[int, dict[str, Estimate]] = {}
    for k, count in planned.items():
        own = [one for one in marked if one.asked.k == k]
        for best in (False, True)[: 1 + (rounds > 1)]:
            for metric in METRICS:
                one = estimate(own, metric, missing=count - len(own), best=best)
                if one is not None:
                    found.setdefault(k, {})[one.metric] = one
    return found


def tables(
    marked: Sequence[Marked], parts: Mapping[int, Mapping[str, Estimate]], seed: int
) -> dict[str, Any]:
    """Metrics by k, points by skill and k, efficiencies; ready for JSON."""
    ks = sorted(parts)
    return {
        "by_k": {str(k): {name: one.to_json() for name, one in parts[k].items()} for k in ks},
        "by_skill": by_skill(marked),
        "efficiency": {str(k): efficiency(marked, k, seed) for k in ks if k > 1},
    }


def by_skill(marked: Sequence[Marked]) -> list[dict[str, Any]]:
    """For every skill and k, how often the skill's point was earned where it was asked for."""
    cells: dict[tuple[str, int], dict[str, float]] = {}
    for one in marked:
        for skill in one.asked.skills:
            cell = cells.setdefault((skill.name, one.asked.k), {})
            cell[one.asked.id] = one.points[skill.name]
    rows = []
    for (name, k), items in sorted(cells.items()):
        found = Estimate.from_items(items, metric="skill_point")
        rows.append({"skill": name, "k": k, "value": found.value, "low": found.low,
                     "high": found.high, "n": found.n})  # fmt: skip
    return rows


def efficiency(marked: Sequence[Marked], k: int, seed: int) -> dict[str, Any] | None:
    """Composition efficiency at `k` with a 95 % bootstrap interval; None where it has no meaning.

    Single texts are resampled within their skill and combinations among themselves. Combinations
    with a skill that was never measured alone are left out and counted in `left_out`.
    """
    import numpy as np

    singles: dict[str, list[float]] = {}
    for one in marked:
        if one.asked.k == 1:
            singles.setdefault(one.asked.skills[0].name, []).append(one.mean["full_marks"])
    asked = [one for one in marked if one.asked.k == k]
    usable = [one for one in asked if all(skill.name in singles for skill in one.asked.skills)]
    if not usable:
        return None
    order = {name: place for place, name in enumerate(singles)}
    index = np.array(
        [[order[skill.name] for skill in one.asked.skills] for one in usable]
    )  # (n, k)
    full = np.array([one.mean["full_marks"] for one in usable])  # (n,)
    rates = np.array([np.mean(values) for values in singles.values()])  # (skills,)
    expected = rates[index].prod(1).mean()
    if expected == 0:
        return None
    rng = np.random.default_rng([seed, k])
    drawn = np.stack(
        [
            np.asarray(values)[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
            for values in singles.values()
        ],
        axis=1,
    )  # (R, skills)
    rows = rng.integers(0, len(usable), (RESAMPLES, len(usable)))  # (R, n)
    products = drawn[:, index].prod(2)  # (R, n)
    bottom = np.take_along_axis(products, rows, 1).mean(1)
    ratios = full[rows].mean(1)[bottom > 0] / bottom[bottom > 0]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {
        "value": float(full.mean() / expected),
        "low": float(low),
        "high": float(high),
        "full_marks": float(full.mean()),
        "expected": float(expected),
        "n": len(usable),
        "left_out": len(asked) - len(usable),
    }
