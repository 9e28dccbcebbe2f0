"""Standard errors, intervals and exact tests on arrays, and the way from ids to arrays.

Every mean here is a ratio over independent *units*: `rows` (m, 2) holds, for each unit c (an item,
or a cluster of items), `S_c = sum_i w_i x_i` and `W_c = sum_i w_i`. With `R = sum S / sum W` the
standard error is the delta-method sandwich with the finite-cluster correction

    se = sqrt( m / (m - 1) * sum_c (S_c - R W_c)^2 ) / sum_c W_c

which is `s / sqrt(n)` for plain items, the clustered error of Miller 2024 (arXiv 2411.00640) for
clusters, and the classical ratio estimator for weights: one formula, four cases.

Importing this module loads numpy and scipy.special, so `estimate.py` imports it inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from deltaloom.core.errors import InputError

if TYPE_CHECKING:
    from deltaloom.core.estimate import Estimate, Over

Array = NDArray[np.float64]

DRAWS_PER_BLOCK = 2**21
"""Resampled entries held at once: about 50 MB, whatever the number of items and resamples."""
ENUMERATED = 16
"""Up to this many nonzero units all 2^m sign patterns are listed; above, they are sampled."""


class Summary(NamedTuple):
    """One mean with its interval, and the rows that resampling needs."""

    value: float
    stderr: float
    low: float
    high: float
    interval: str
    spread: float
    """The standard error behind the interval: `stderr`, or its adjusted value (`bonett_price`)."""
    rows: Array


class Measured(NamedTuple):
    """What `measure` found: fields of an Estimate, and what its tests and checks need."""

    facts: dict[str, Any]
    spread: float
    rows: Array
    units: Array
    """Sums of the independent units, (m,): what the sign test flips."""


def numbers(given: Mapping[str, float], what: str, remedy: str) -> dict[str, float]:
    """`given` as finite floats sorted by id; InputError naming the id otherwise."""
    found = {}
    for key, number in given.items():
        if not isinstance(key, str):
            raise InputError(f"{what} {key!r}: ids must be text")
        try:
            found[key] = float(number)
        except (TypeError, ValueError):
            found[key] = math.nan
        if not math.isfinite(found[key]):
            raise InputError(f"{what} {key!r} is not a finite number ({number!r}): {remedy}")
    return dict(sorted(found.items()))


def covering(given: Mapping[str, Any] | None, ids: Iterable[str], what: str) -> Any:
    """The part of `given` that belongs to `ids`, in their order; InputError for an absent id."""
    if given is None:
        return None
    for key in ids:
        if given.get(key) is None:
            raise InputError(f"{what}: item {key!r} has none")
    return {key: given[key] for key in ids}


def checked_weights(
    given: Mapping[str, float] | None, ids: Iterable[str], what: str
) -> dict[str, float] | None:
    """Finite weights >= 0 of `ids`, not all zero; None stays None."""
    if given is None:
        return None
    weights = numbers(covering(given, ids, what), f"{what}: that of", "give 0 or more")
    for key, weight in weights.items():
        if weight < 0:
            raise InputError(f"{what}: that of {key!r} is negative ({weight!r})")
    if not any(weights.values()):
        raise InputError(f"{what}: all are zero")
    return weights


def is_binary(items: Mapping[str, float], ids: Iterable[str] | None = None) -> bool:
    """Whether every item (of `ids`) is 0 or 1."""
    return all(items[key] in (0.0, 1.0) for key in (items if ids is None else ids))


def common(
    estimates: Sequence[Estimate],
) -> tuple[list[str], dict[str, str] | None, dict[str, float] | None]:
    """The ids that all estimates scored, sorted, with the clusters and weights they agree on."""
    if not estimates:
        raise InputError("no estimates given")
    first = estimates[0]
    for one in estimates[1:]:
        if (one.metric, one.better) != (first.metric, first.better):
            raise InputError(
                f"cannot put together {first.metric} ({first.better} is better) "
                f"and {one.metric} ({one.better} is better)"
            )
        if (one.weights is None) != (first.weights is None):
            raise InputError(f"{first.metric}: weights on one side only: weight both or neither")
    ids = sorted(set(first.items).intersection(*(one.items for one in estimates[1:])))
    if not ids:
        raise InputError(f"{first.metric}: no item was scored by all {len(estimates)} estimates")
    agreed: dict[str, dict[str, Any] | None] = {}
    for name in ("clusters", "weights"):
        given = [part for one in estimates if (part := getattr(one, name)) is not None]
        for part in given[1:]:
            odd = next((key for key in ids if part[key] != given[0][key]), None)
            if odd is not None:
                why = "; losses under two tokenizers do not compare" if name == "weights" else ""
                raise InputError(
                    f"{first.metric}: {name} of {odd!r} differ: {given[0][odd]!r}, {part[odd]!r}"
                    f"{why}"
                )
        agreed[name] = {key: given[0][key] for key in ids} if given else None
    if agreed["weights"] is not None and not any(agreed["weights"].values()):
        raise InputError(f"{first.metric}: the items that all scored have weight zero")
    return ids, agreed["clusters"], agreed["weights"]


def measure(
    series: Sequence[Mapping[str, float]],
    clusters: Mapping[str, str] | None,
    weights: Mapping[str, float] | None,
    confidence: float,
    steps: str | None = None,
    over: Over = "items",
) -> Measured:
    """One series of items summarised over items, or several seeds' over seeds or over both.

    All mappings have the same ids in the same order; `steps` is that of `summarise`.
    """
    if not 0.0 < confidence < 1.0:
        raise InputError(f"confidence = {confidence}: must lie between 0 and 1")
    grid = np.array([list(one.values()) for one in series], dtype=np.float64)  # (seeds, n)
    w = None if weights is None else np.array(list(weights.values()))
    codes = None
    if clusters is not None:
        order = {label: code for code, label in enumerate(dict.fromkeys(clusters.values()))}
        codes = np.array([order[label] for label in clusters.values()])
    items = grid.mean(axis=0)
    found = summarise(items, w, codes, confidence, steps)
    pooled: dict[str, Any] = {}
    units = found.rows[:, 0]
    if over != "items":
        rows = [unit_rows(values, w, codes) for values in grid]
        each = np.array([ratio(one)[0] for one in rows])
        pooled = {"seed_values": tuple(each.tolist()), "stderr_items": found.stderr}
        found, units = summarise(each, None, None, confidence, None), each
        found = found._replace(interval="seeds-t")
        if over == "both":
            from deltaloom.core._crossed import crossed

            found = crossed(rows, confidence)
    facts = {name: getattr(found, name) for name in ("value", "stderr", "low", "high", "interval")}
    facts |= {"n": len(items), "items": dict(zip(series[0], items.tolist(), strict=True))}
    facts |= {"clusters": clusters, "weights": weights, "confidence": confidence}
    return Measured(facts | pooled, found.spread, found.rows, units)


def summarise(
    values: Array,
    weights: Array | None,
    codes: NDArray[np.intp] | None,
    confidence: float,
    steps: str | None,
) -> Summary:
    """The mean of `values` (n,), its stderr and its interval.

    `steps` says what the values can be: `"binary"` (0 or 1), `"paired"` (differences of two binary
    values: -1, 0 or 1) or None (any number). A t interval on 0/1 items that all agree has width
    zero, which claims certainty; there the closed form is used with the effective number of units.
    """
    rows = unit_rows(values, weights, codes)
    value, stderr = ratio(rows)
    plain = weights is None and codes is None
    words = ["clustered"] * (codes is not None) + ["ratio"] * (weights is not None)
    name = "-".join(words) or "clt-t"
    if steps is not None and (plain or stderr == 0.0):
        w = np.ones_like(values) if weights is None else weights
        up, down = (float(w[values == side].sum() / w.sum()) for side in (1.0, -1.0))
        units = effective_units(rows[:, 1])
        if steps == "binary":
            closed, spread = "wilson", stderr
            low, high = wilson(up, units, confidence)
        else:
            closed = "bonett-price"
            low, high, spread = bonett_price(up, down, units, confidence)
        name = closed if plain else f"{name}-{closed}"
        return Summary(value, stderr, low, high, name, spread, rows)
    low, high = student(value, stderr, len(rows), confidence)
    if steps is not None:
        # The mean itself cannot leave the range, so clipping costs no coverage.
        low, high = max(low, 0.0 if steps == "binary" else -1.0), min(high, 1.0)
    return Summary(value, stderr, low, high, name, stderr, rows)


def unit_rows(values: Array, weights: Array | None, codes: NDArray[np.intp] | None) -> Array:
    """Sums `(S_c, W_c)` per unit, (m, 2); units of weight zero say nothing and are dropped."""
    w = np.ones_like(values) if weights is None else weights
    rows = np.stack([w * values, w], axis=1)  # (n, 2)
    if codes is not None:
        items, rows = rows, np.zeros((int(codes.max()) + 1, 2))
        np.add.at(rows, codes, items)
    return rows[rows[:, 1] > 0]


def ratio(rows: Array) -> tuple[float, float]:
    """`R` and its sandwich standard error; infinite for one unit, whose spread is unknown."""
    total, weight = rows.sum(axis=0)
    value, m = total / weight, len(rows)
    if m < 2:
        return float(value), math.inf
    residual = rows[:, 0] - value * rows[:, 1]
    return float(value), math.sqrt(m / (m - 1) * float((residual**2).sum())) / float(weight)


def effective_units(weights: Array) -> float:
    """Kish's effective number `(sum W)^2 / sum W^2` of units with unequal weights."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def student(value: float, stderr: float, units: int, confidence: float) -> tuple[float, float]:
    """`value -+ t_{1-alpha/2, units-1} * stderr`; the whole line for one unit."""
    if units < 2:
        return -math.inf, math.inf
    reach = float(special.stdtrit(units - 1, (1 + confidence) / 2)) * stderr
    return value - reach, value + reach


def wilson(share: float, n: float, confidence: float) -> tuple[float, float]:
    """Wilson's 1927 score interval of a proportion; `n` may be an effective, fractional number."""
    z2 = float(special.ndtri((1 + confidence) / 2)) ** 2
    centre = share + z2 / (2 * n)
    reach = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    # Exact at the ends, where rounding would leave 1e-17 beside 0 or 1.
    low = 0.0 if share == 0 else (centre - reach) / (1 + z2 / n)
    high = 1.0 if share == 1 else (centre + reach) / (1 + z2 / n)
    return low, high


def bonett_price(up: float, down: float, n: float, confidence: float) -> tuple[float, float, float]:
    """Interval of a difference of paired proportions, and its adjusted standard error.

    Bonett and Price 2012: with `p = (n up + 1) / (n + 2)`, `q = (n down + 1) / (n + 2)` the
    interval is `p - q -+ z sqrt((p + q - (p - q)^2) / (n + 2))`. Unlike the t interval it does not
    collapse when no item, or every item, is discordant.
    """
    p, q = (n * up + 1) / (n + 2), (n * down + 1) / (n + 2)
    spread = math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    reach = float(special.ndtri((1 + confidence) / 2)) * spread
    return max(p - q - reach, -1.0), min(p - q + reach, 1.0), spread


def bca(rows: Array, confidence: float, seed: int, resamples: int) -> tuple[float, float]:
    """Bias-corrected accelerated bootstrap interval of `R` over units (Efron 1987).

    The bias `z0` counts ties by half, the acceleration comes from the leave-one-unit-out values.
    One unit cannot be resampled: the interval is then infinite.
    """
    if len(rows) < 2:
        return -math.inf, math.inf
    total = rows.sum(axis=0)
    draws = _resampled_sums(rows, np.random.default_rng(seed), resamples)
    values, value = draws[:, 0] / draws[:, 1], total[0] / total[1]
    below = (np.mean(values < value) + np.mean(values <= value)) / 2
    z0 = special.ndtri(np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples))
    left_out = (total[0] - rows[:, 0]) / (total[1] - rows[:, 1])
    influence = left_out.mean() - left_out
    # Free of scale, so that the powers of tiny differences do not underflow.
    influence /= np.abs(influence).max() or 1.0
    squares = float((influence**2).sum())
    acceleration = float((influence**3).sum()) / (6 * squares**1.5) if squares else 0.0
    z = special.ndtri(np.array([(1 - confidence) / 2, (1 + confidence) / 2])) + z0
    level = special.ndtr(z0 + z / np.maximum(1 - acceleration * z, 1e-6))
    low, high = np.quantile(values, level)
    return float(low), float(high)


def _resampled_sums(rows: Array, rng: np.random.Generator, resamples: int) -> Array:
    """Column sums of `resamples` draws of m rows with replacement, (resamples, 2), in blocks.

    With few distinct rows (binary items) a multinomial over them has the same distribution at a
    cost that does not grow with m. Distinct rows keep their order of first appearance, so that
    negating the values negates the result exactly.
    """
    m = len(rows)
    _, first, counts = np.unique(rows, axis=0, return_index=True, return_counts=True)
    few = 8 * len(first) <= m
    order = np.argsort(first)
    distinct, share = rows[first[order]], counts[order] / m
    block = max(1, DRAWS_PER_BLOCK // (len(distinct) if few else m))
    sums = np.empty((resamples, 2))
    for start in range(0, resamples, block):
        part = sums[start : start + block]
        if few:
            part[:] = rng.multinomial(m, share, size=len(part)) @ distinct
            continue
        chosen = rng.integers(0, m, size=(len(part), m), dtype=np.int32)
        for column in (0, 1):
            part[:, column] = np.ascontiguousarray(rows[:, column])[chosen].sum(axis=1)
    return sums


def mcnemar(up: int, down: int) -> float:
    """Two-sided exact p of McNemar: `up` and `down` are equally likely among discordant items."""
    return min(1.0, 2 * float(special.bdtr(min(up, down), up + down, 0.5))) if up + down else 1.0


def sign_flip(sums: Array, seed: int, resamples: int) -> tuple[float, str]:
    """Two-sided p of `sum S_c` when each unit's sign is a fair coin, and the name of the test.

    All sign patterns are listed for up to `ENUMERATED` nonzero units; above, `resamples` patterns
    are drawn and `p = (k + 1) / (resamples + 1)`, which is valid and never zero (Phipson 2010).
    """
    sizes = np.abs(sums[sums != 0])
    m = len(sizes)
    # Equal sums reached in different orders may differ in their last bits and still count as ties.
    bar = abs(float(sums.sum())) - 1e-12 * float(sizes.sum())
    if m <= ENUMERATED:
        patterns = (np.arange(2**m)[:, None] >> np.arange(m)) & 1  # (2^m, m)
        return float(np.mean(np.abs((2 * patterns - 1) @ sizes) >= bar)), "sign-flip-exact"
    rng, block, hits = np.random.default_rng(seed), max(1, DRAWS_PER_BLOCK // m), 0
    for start in range(0, resamples, block):
        count = min(block, resamples - start) * m
        bits = np.unpackbits(np.frombuffer(rng.bytes(-(-count // 8)), np.uint8), count=count)
        flipped = (2.0 * bits.reshape(-1, m) - 1.0) @ sizes
        hits += int(np.count_nonzero(np.abs(flipped) >= bar))
    return (hits + 1) / (resamples + 1), "sign-flip-monte-carlo"
