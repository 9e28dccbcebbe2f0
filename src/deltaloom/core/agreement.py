"""How far two raters agree, each number with an interval: kappa, alpha, rank correlations.

With `p` the share of items on which they agree (or its weighted form) and `c` what chance would
give from their own label shares, Cohen's kappa (1960, weighted 1968) is `(p - c) / (1 - c)`; PABAK
(Byrt et al. 1993) puts 1 / categories in c's place; Krippendorff's alpha counts disagreement over
all pairs of ratings of an item, so that it takes any number of raters and gaps. Rank correlations
are Spearman's and Kendall's tau-b.

Errors are jackknifed, by whole clusters where items come in them: `items` are pseudo-values, so
that two judges' kappas are compared in pairs (`compare`). Intervals are Student's t, for
correlations on Fisher's scale `atanh`, which keeps them inside [-1, 1] (coverage simulated in the
tests). Raters who agree on every item show no spread; there the lower end is Wilson's for p, turned
into kappa.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Weights = Literal["none", "linear", "quadratic"]
LEAST = 4
"""Items that both must have rated."""


def kappa(
    a: Mapping[str, Hashable],
    b: Mapping[str, Hashable],
    *,
    weights: Weights = "none",
    clusters: Mapping[str, str] | None = None,
    metric: str = "kappa",
) -> Estimate:
    """Cohen's kappa of two raters (id -> label) on the items both rated.

    `weights` counts near misses of numbers by their distance, or its square. Where both always give
    one and the same label kappa is undefined: InputError, as for fewer than four shared items.
    """
    import numpy as np

    ids = _shared(a, b, metric)
    ordered = weights != "none"
    labels = _ordered((rated[i] for rated in (a, b) for i in ids), ordered, metric)
    if len(labels) < 2:
        raise InputError(f"{metric}: both give {labels[0]!r} to every item, so it is undefined")
    at = {label: k for k, label in enumerate(labels)}
    table = np.zeros((len(ids), len(labels), len(labels)))
    table[range(len(ids)), [at[a[i]] for i in ids], [at[b[i]] for i in ids]] = 1.0
    place = np.array(labels if ordered else range(len(labels)), dtype=np.float64)
    gaps = np.abs(place[:, None] - place)
    cost = gaps**2 if weights == "quadratic" else gaps if ordered else (gaps > 0).astype(float)

    def statistic(counts: Array) -> float:
        total = counts.sum()
        expected = float((counts.sum(1) / total) @ cost @ (counts.sum(0) / total))
        return 1.0 - float((counts * cost).sum()) / total / expected if expected else 1.0

    perfect = not bool((table * cost).any())
    expected = 1.0 - _chance(table.sum(0))
    return _jackknifed(ids, table, statistic, clusters, metric, floor=expected if perfect else None)


def pabak(
    a: Mapping[str, Hashable],
    b: Mapping[str, Hashable],
    *,
    clusters: Mapping[str, str] | None = None,
    metric: str = "pabak",
) -> Estimate:
    """Kappa with all categories held equally likely: `(C p - 1) / (C - 1)`, C those that occur."""
    ids = _shared(a, b, metric)
    count = max(2, len({*(a[i] for i in ids), *(b[i] for i in ids)}))
    share = Estimate.from_items(
        {i: float(a[i] == b[i]) for i in ids}, metric=metric, clusters=clusters
    )

    def turned(p: float) -> float:
        return (count * p - 1) / (count - 1)

    return replace(
        share,
        value=turned(share.value),
        stderr=share.stderr * count / (count - 1),
        low=turned(share.low),
        high=turned(share.high),
        items={i: turned(x) for i, x in share.items.items()},
    )


def correlation(
    a: Mapping[str, float],
    b: Mapping[str, float],
    *,
    kind: Literal["pearson", "spearman", "kendall"] = "spearman",
    clusters: Mapping[str, str] | None = None,
    metric: str | None = None,
) -> Estimate:
    """Correlation of two raters' numbers on the items both rated.

    Raises InputError for fewer than four shared items and for a rater who gives one number only.
    """
    import numpy as np

    metric = metric or kind
    ids = _shared(a, b, metric)
    pairs = np.array([[float(a[i]), float(b[i])] for i in ids])  # (n, 2)
    if not np.isfinite(pairs).all() or not (np.ptp(pairs, axis=0) > 0).all():
        raise InputError(f"{metric}: a rater gives one number to all items, or none at all")
    function = {"pearson": _pearson, "spearman": _spearman, "kendall": _kendall}[kind]
    codes, groups = _units(ids, clusters)
    value = function(pairs)
    left_out = np.array([function(pairs[codes != c]) for c in range(groups)])
    return _summary(ids, value, left_out, codes, clusters, metric, fisher=True)


def krippendorff_alpha(
    ratings: Mapping[str, Sequence[Hashable | None]],
    *,
    level: Literal["nominal", "interval"] = "nominal",
    clusters: Mapping[str, str] | None = None,
    metric: str = "alpha",
) -> Estimate:
    """Krippendorff's alpha of any number of ratings an item; None is a rating that is absent.

    Items with fewer than two ratings say nothing and are counted in `missing`. Raises InputError
    for fewer than four items and where all ratings are the same.
    """
    import numpy as np

    kept = {
        key: [one for one in given if one is not None]
        for key, given in sorted(ratings.items())
        if sum(one is not None for one in given) > 1
    }
    ids = list(kept)
    if len(ids) < LEAST:
        raise InputError(f"{metric}: {len(ids)} items have two ratings; {LEAST} are needed")
    labels = _ordered(
        (one for given in kept.values() for one in given), level == "interval", metric
    )
    if len(labels) < 2:
        raise InputError(f"{metric}: every rating is {labels[0]!r}, so it is undefined")
    at = {label: k for k, label in enumerate(labels)}
    counts = np.zeros((len(ids), len(labels)))
    for row, given in zip(counts, kept.values(), strict=True):
        np.add.at(row, [at[one] for one in given], 1.0)
    place = np.array(labels if level == "interval" else range(len(labels)), dtype=np.float64)
    gaps = (place[:, None] - place) ** 2 if level == "interval" else 1.0 - np.eye(len(labels))
    # Coincidences of an item: pairs of its ratings, each rating counted once in all.
    tables = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(labels))
    tables /= (counts.sum(1) - 1)[:, None, None]

    def statistic(table: Array) -> float:
        margin = table.sum(0)
        total = margin.sum()
        expected = float(margin @ gaps @ margin) / (total - 1)
        return 1.0 - float((table * gaps).sum()) / expected if expected else 1.0

    perfect = not bool((tables * gaps).any())
    floor = 1.0 - _chance(tables.sum(0)) if perfect else None
    found = _jackknifed(ids, tables, statistic, clusters, metric, floor=floor)
    return replace(found, missing=len(ratings) - len(ids))


def _ordered(given: Iterable[Hashable], numbers: bool, metric: str) -> list[Any]:
    """The labels that occur, in the order of their texts, or as numbers in theirs."""
    labels: list[Any] = list(set(given))
    if not numbers:
        return sorted(labels, key=str)
    if not all(isinstance(one, int | float) for one in labels):
        raise InputError(f"{metric}: distances between labels need labels that are numbers")
    return sorted(labels)


def _chance(counts: Array) -> float:
    """Agreement expected from the label shares."""
    total = counts.sum()
    return float((counts.sum(1) / total) @ (counts.sum(0) / total))


def _jackknifed(
    ids: list[str],
    tables: Array,
    statistic: Callable[[Array], float],
    clusters: Mapping[str, str] | None,
    metric: str,
    floor: float | None,
) -> Estimate:
    """A statistic of summed tables, (n, C, C), with each unit left out once."""
    import numpy as np

    codes, groups = _units(ids, clusters)
    sums = np.zeros((groups, *tables.shape[1:]))
    np.add.at(sums, codes, tables)
    whole = tables.sum(0)
    left_out = np.array([statistic(whole - one) for one in sums])
    found = _summary(ids, statistic(whole), left_out, codes, clusters, metric, fisher=False)
    if floor is None and found.stderr == 0.0:
        # A rater who says one thing only: kappa is 0 whichever item is left out, and tells nothing.
        return replace(found, stderr=math.inf, low=-1.0, high=1.0)
    if floor is None:
        return found
    from deltaloom.core._intervals import wilson

    low, _ = wilson(1.0, groups, found.confidence)
    return replace(found, low=1.0 - (1.0 - low) / floor, high=1.0, interval="jackknife-wilson")


def _units(ids: list[str], clusters: Mapping[str, str] | None) -> tuple[NDArray[np.intp], int]:
    """The unit of each item and how many there are."""
    import numpy as np

    from deltaloom.core import _intervals

    if clusters is None:
        return np.arange(len(ids)), len(ids)
    labels = _intervals.covering(clusters, ids, "clusters")
    order = {label: code for code, label in enumerate(dict.fromkeys(labels.values()))}
    return np.array([order[label] for label in labels.values()]), len(order)


def _summary(
    ids: list[str],
    value: float,
    left_out: Array,
    codes: NDArray[np.intp],
    clusters: Mapping[str, str] | None,
    metric: str,
    fisher: bool,
) -> Estimate:
    """Value, jackknife error and interval; pseudo-values of a unit are shared by its items."""
    import numpy as np

    from deltaloom.core import _intervals

    units = len(left_out)
    if units < 2 or not np.isfinite(left_out).all():
        stderr = math.inf
        pseudo = np.full(units, value)
    else:
        spread = left_out - left_out.mean()
        stderr = math.sqrt((units - 1) / units * float((spread**2).sum()))
        pseudo = value - (units - 1) * spread
    sizes = np.bincount(codes, minlength=units)
    # Each item carries its unit's deviation, scaled so that the mean over items is the value.
    each = value + (pseudo - value)[codes] * len(ids) / (units * sizes[codes])
    if fisher and math.isfinite(stderr) and abs(value) < 1:
        ends = _intervals.student(math.atanh(value), stderr / (1 - value**2), units, 0.95)
        low, high, name = math.tanh(ends[0]), math.tanh(ends[1]), "jackknife-fisher"
    elif math.isfinite(stderr):
        low, high = _intervals.student(value, stderr, units, 0.95)
        low, high, name = max(low, -1.0), min(high, 1.0), "jackknife-t"
    else:
        low, high, name = -1.0, 1.0, "jackknife-t"
    return Estimate(
        value=value,
        stderr=stderr,
        low=low,
        high=high,
        n=len(ids),
        metric=metric,
        better="higher",
        of="",
        items=dict(zip(ids, each.tolist(), strict=True)),
        clusters=None if clusters is None else {i: clusters[i] for i in ids},
        interval=name,
    )


def _shared(a: Mapping[str, Hashable], b: Mapping[str, Hashable], metric: str) -> list[str]:
    ids = sorted(a.keys() & b.keys())
    if len(ids) < LEAST:
        raise InputError(f"{metric}: both rated {len(ids)} items; {LEAST} are needed")
    return ids


def _pearson(pairs: Array) -> float:
    centred = pairs - pairs.mean(0)
    scale = math.sqrt(float((centred[:, 0] ** 2).sum()) * float((centred[:, 1] ** 2).sum()))
    return float(centred[:, 0] @ centred[:, 1]) / scale if scale else math.nan


def _spearman(pairs: Array) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(pairs, axis=0))


def _kendall(pairs: Array) -> float:
    from scipy.stats import kendalltau

    found: Any = kendalltau(pairs[:, 0], pairs[:, 1])
    return float(found.statistic)
