"""Estimate: a measured number with its error, its items and its cost; comparisons are paired.

Which interval, and why (formulas in `_intervals.py`; the practice follows Miller 2024, arXiv
2411.00640):

- `wilson`: 0/1 items; `clt-t`: any other numbers, mean -+ t * s / sqrt(n)
- `clustered`: items in C clusters (one source text, one skill tuple), sandwich error, t on C - 1
- `ratio`: weighted, value = sum w x / sum w (loss per token); in clusters `clustered-ratio`
- `bonett-price`: paired differences of 0/1 items
- `seeds-t`: several training seeds, the seed is the random unit; `seeds-items-t`: seeds and items
  are both random effects (`_crossed.py`)

Where 0/1 items all agree the sandwich error is zero and claims certainty; `clustered-wilson`,
`ratio-bonett-price` and so on name the closed form used there, with the effective number of
clusters. **One item or one cluster shows no spread: `stderr` is infinite and the interval is the
whole range (Wilson's for a 0/1 item); in JSON every infinite number is null.**

Not covered: errors of sampled generations or of a judge, multiway clusters, and items missing
because they are hard: `missing` counts them, nothing here can correct for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from deltaloom.core._documents import plain, record_of, restore
from deltaloom.core.errors import InputError
from deltaloom.core.multiplicity import benjamini_hochberg, holm
from deltaloom.core.power import POWER, detectable, items_needed

__all__ = [
    "Comparison",
    "Estimate",
    "benjamini_hochberg",
    "compare",
    "compare_seeds",
    "holm",
    "items_needed",
    "pool_seeds",
]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, its standard error and interval, and the per-item values they came from."""

    value: float
    stderr: float
    low: float
    high: float
    n: int
    metric: str
    better: Literal["higher", "lower"]
    of: str
    items: Mapping[str, float] = field(repr=False)
    """Per-item values by content id, sorted by id so that equal items give equal bytes."""
    clusters: Mapping[str, str] | None = field(repr=False)
    interval: str
    missing: int = 0
    """Items that could not be scored. They are left out, never counted as zero."""
    cost: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] | None = field(default=None, repr=False)
    confidence: float = 0.95
    seed_values: tuple[float, ...] = ()
    """One value per training seed when seeds were pooled; `stderr` is then over seeds."""
    stderr_items: float | None = None
    """Beside pooled seeds: the error over items of the seed-averaged items."""

    @classmethod
    def from_items(
        cls,
        items: Mapping[str, float],
        *,
        metric: str,
        better: Literal["higher", "lower"] = "higher",
        of: str = "",
        clusters: Mapping[str, str] | None = None,
        weights: Mapping[str, float] | None = None,
        missing: int = 0,
        cost: Mapping[str, float] | None = None,
        confidence: float = 0.95,
    ) -> Self:
        """The mean of `items` (weighted if `weights`) with the interval that fits them.

        Raises InputError for no items, a value that is not a finite number, an id without its
        cluster or weight, a negative weight or no positive one, and settings out of range.
        """
        from deltaloom.core import _intervals

        if not items:
            raise InputError(f"{metric}: no items to estimate from")
        if better not in ("higher", "lower"):
            raise InputError(f"{metric}: better = {better!r}: must be 'higher' or 'lower'")
        if missing < 0:
            raise InputError(f"{metric}: missing = {missing}: must not be negative")
        values = _intervals.numbers(items, f"{metric}: item", "leave it out, count it in `missing`")
        found = _intervals.measure(
            [values],
            _intervals.covering(clusters, values, f"{metric}: clusters"),
            _intervals.checked_weights(weights, values, f"{metric}: weights"),
            confidence,
            steps="binary" if _intervals.is_binary(values) else None,
        )
        spent = _intervals.numbers(cost or {}, f"{metric}: cost", "leave it out")
        return cls(**found.facts, metric=metric, better=better, of=of, missing=missing, cost=spent)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping without NaN or Infinity, which `from_json` turns back exactly."""
        return plain(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any] | str) -> Self:
        """The Estimate that `to_json` wrote, from the mapping or its text; else InputError."""
        record = record_of(cls, document)
        record["seed_values"] = tuple(record["seed_values"])
        restore(record, stderr=math.inf, low=-math.inf, high=math.inf)
        if record["seed_values"]:
            restore(record, stderr_items=math.inf)
        return cls(**record)

    def summary(self) -> str:
        """One line with two digits of error: `accuracy 0.713 [0.651, 0.768] (n=230)`."""
        places = _places(self)
        level = "" if self.confidence == 0.95 else f"{100 * self.confidence:g} % "
        counts = [f"n={self.n}"]
        if self.clusters is not None:
            counts.append(f"{len(set(self.clusters.values()))} clusters")
        if self.seed_values:
            counts.append(f"{len(self.seed_values)} seeds")
        if self.missing:
            counts.append(f"{self.missing} missing")
        value, low, high = (f"{x:.{places}f}" for x in (self.value, self.low, self.high))
        return f"{self.metric} {value} {level}[{low}, {high}] ({', '.join(counts)})"

    def __str__(self) -> str:
        return f"{self.of}: {self.summary()}" if self.of else self.summary()


Seeds = Sequence[Estimate]  # one measurement after each of several training seeds
Over = Literal["items", "seeds", "both"]  # what a mean is taken over, and what is new next time


@dataclass(frozen=True, slots=True)
class Comparison:
    """`a - b` on the same items. The verdict rests on `difference`, which needs no random seed."""

    a: str
    b: str
    difference: Estimate
    """The paired difference with its per-item differences; the sign is a - b whatever is better."""
    shared: int
    only_a: int
    only_b: int
    wins_a: int
    """Shared items on which `a` is strictly better; the rest of the discordant ones is `wins_b`."""
    wins_b: int
    unit: Literal["items", "clusters", "seeds"]
    """What is independent: the unit of the interval, of the bootstrap and of the sign flips."""
    bootstrap: tuple[float, float] | None
    """BCa interval over units, a check on `difference`; None over seeds, which are too few."""
    p_value: float
    test: str
    """`mcnemar-exact`, `sign-flip-exact` or `sign-flip-monte-carlo`."""
    mde: float
    """Minimum detectable effect: the true difference found with 80 % power at this error."""
    favours: Literal["a", "b", "neither"]
    """The better one when the interval of `difference` excludes zero."""

    @property
    def discordance(self) -> float:
        """The share of shared items on which the two differ, in [0, 1]."""
        return (self.wins_a + self.wins_b) / self.shared

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping without NaN or Infinity, which `from_json` turns back exactly."""
        return plain(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any] | str) -> Self:
        """The Comparison that `to_json` wrote, from the mapping or its text; else InputError."""
        record = record_of(cls, document)
        record["difference"] = Estimate.from_json(record["difference"])
        restore(record, mde=math.inf)
        if record["bootstrap"] is not None:
            low, high = record["bootstrap"]  # one unit: both ends are unknown
            record["bootstrap"] = (-math.inf, math.inf) if low is None else (low, high)
        return cls(**record)

    def summary(self) -> str:
        """One line: the difference, the exact p, the detectable effect and the verdict."""
        verdict = {"a": self.a or "a", "b": self.b or "b"}.get(self.favours, "neither")
        places = _places(self.difference)
        return (
            f"{self.difference.summary()}, p={self.p_value:.2g} ({self.test}), "
            f"detects {self.mde:.{places}f}, favours {verdict}"
        )

    def __str__(self) -> str:
        return f"{self.difference.of}: {self.summary()}" if self.difference.of else self.summary()


def compare(
    a: Estimate, b: Estimate, *, confidence: float = 0.95, seed: int = 0, resamples: int = 10_000
) -> Comparison:
    """The paired difference `a - b` on the items both scored, clustered or weighted as they are.

    `seed` and `resamples` serve the bootstrap and the Monte-Carlo test only. 0/1 items without
    clusters or weights are tested by McNemar, all others by flipping the signs of whole units.
    Raises InputError for different metrics, for fewer than two shared items and for shared items
    whose clusters or weights disagree (losses per token under two tokenizers, say). Pooled seeds
    are taken as they are: `compare_seeds` is the one that speaks of new seeds.
    """
    return _paired([a], [b], "items", confidence, seed, resamples)


def compare_seeds(
    a: Seeds,
    b: Seeds,
    *,
    items: Literal["fixed", "random"] = "fixed",
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 10_000,
) -> Comparison:
    """`a - b` over training seeds, paired by position: seed k of `a` against seed k of `b`.

    The interval is Student's t over the per-seed paired differences and the test flips the sign of
    whole seeds, so `p_value` cannot fall below `2^(1 - seeds)`. `difference.stderr_items` keeps the
    error over items beside it. With `items="random"` interval and verdict speak of new seeds and
    new items at once, as `pool_seeds` does; the test stays that over seeds. Raises InputError like
    `compare`, and for fewer than two seeds.
    """
    if len(a) != len(b) or len(a) < 2:
        raise InputError(f"{len(a)} and {len(b)} seeds: give two lists of equal length, 2 or more")
    over = "seeds" if items == "fixed" else "both"
    return _paired(a, b, over, confidence, seed, resamples)


def pool_seeds(estimates: Seeds, *, items: Literal["fixed", "random"] = "fixed") -> Estimate:
    """One measurement over several training seeds: the mean over seeds, Student's t over seeds.

    The interval speaks of new seeds on these items; `stderr_items` of new items at these seeds.
    Neither contains the other: report both, or let `items="random"` make one interval for new
    seeds and new items, both random effects. Items are averaged over seeds; those that some seed
    could not score are left out everywhere and counted in `missing`. Costs are added up. Raises
    InputError for an empty list, different metrics, or no item that all seeds scored.
    """
    from deltaloom.core import _intervals

    ids, clusters, weights = _intervals.common(estimates)
    series = [{key: one.items[key] for key in ids} for one in estimates]
    first = estimates[0]
    # An item that every seed failed on is in no `items`: only the counts know of it.
    planned = max(one.n + one.missing for one in estimates)
    seen = len(set().union(*(one.items for one in estimates)))
    keys = sorted({key for one in estimates for key in one.cost})
    over = "seeds" if items == "fixed" else "both"
    found = _intervals.measure(series, clusters, weights, first.confidence, over=over)
    return Estimate(
        **found.facts,
        metric=first.metric,
        better=first.better,
        of=first.of,
        missing=max(planned, seen) - len(ids),
        cost={key: math.fsum(one.cost.get(key, 0.0) for one in estimates) for key in keys},
    )


def _paired(
    a: Seeds, b: Seeds, over: Over, confidence: float, seed: int, resamples: int
) -> Comparison:
    """The Comparison of two aligned lists of estimates; one of each when `over` is items."""
    from deltaloom.core import _intervals

    over_seeds = over != "items"

    ids, clusters, weights = _intervals.common([*a, *b])
    if len(ids) < 2:
        raise InputError(f"{a[0].of!r} and {b[0].of!r} share {len(ids)} item(s): need at least 2")
    if resamples < 1:
        raise InputError(f"resamples = {resamples}: must be at least 1")
    only_a, only_b = (len(set().union(*(one.items for one in side)) - set(ids)) for side in (a, b))
    gaps = [{key: x.items[key] - y.items[key] for key in ids} for x, y in zip(a, b, strict=True)]
    binary = not over_seeds and all(_intervals.is_binary(one.items, ids) for one in (*a, *b))
    found = _intervals.measure(
        gaps, clusters, weights, confidence, "paired" if binary else None, over
    )
    difference = Estimate(
        **found.facts,
        metric=f"{a[0].metric} difference",
        better=a[0].better,
        of=f"{a[0].of} - {b[0].of}" if a[0].of or b[0].of else "",
        missing=only_a + only_b,
    )
    higher = sum(value > 0 for value in difference.items.values())
    lower = sum(value < 0 for value in difference.items.values())
    if binary and not (clusters or weights):
        p_value, test = _intervals.mcnemar(higher, lower), "mcnemar-exact"
    else:
        p_value, test = _intervals.sign_flip(found.units, seed, resamples)
    a_is_high = a[0].better == "higher"
    verdict: Literal["a", "b", "neither"] = "neither"
    if difference.low > 0 or difference.high < 0:
        verdict = "a" if a_is_high == (difference.low > 0) else "b"
    return Comparison(
        a=a[0].of,
        b=b[0].of,
        difference=difference,
        shared=len(ids),
        only_a=only_a,
        only_b=only_b,
        wins_a=higher if a_is_high else lower,
        wins_b=lower if a_is_high else higher,
        unit="seeds" if over_seeds else "clusters" if clusters else "items",
        bootstrap=None if over_seeds else _intervals.bca(found.rows, confidence, seed, resamples),
        p_value=p_value,
        test=test,
        mde=detectable(found.spread, len(found.units), confidence, POWER),
        favours=verdict,
    )


def _places(estimate: Estimate) -> int:
    """Decimals that show two digits of the interval's half width; 3 when it has none."""
    half = (estimate.high - estimate.low) / 2
    return min(9, max(0, 1 - math.floor(math.log10(half)))) if 0 < half < math.inf else 3
