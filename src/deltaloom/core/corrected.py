"""What a fallible judge's grades say of the truth, with a few grades that are known to be right.

**Prediction-powered inference** (Angelopoulos et al. 2023, arXiv 2301.09633; tuned as PPI++, arXiv
2311.01453): with judge's grades f on N items without and on n items with a true grade y,

    value = lambda mean_N(f) + mean_n(y - lambda f),
    var   = var_n(y - lambda f) / n + lambda^2 var_N(f) / N,
    lambda = cov_n(y, f) / ((1 + n / N) var_n(f)) in [0, 1]

so a useless judge (lambda 0) gives the mean of the true grades, and no judge does harm. It asks for
true grades of items **drawn at random** from all. Interval: Student's t on Satterthwaite's degrees
of freedom, n - 2 for the gold part (lambda is fitted). Ours, for 0/1 grades: centre, lambda and
variance are those of the gold table with half an item added to each of its four cells (Jeffreys);
as published the interval covers 82 % at n = 50 where 5 % are true and the judge is right 99 times
in 100, with it 94 % and more at every n from 20 to 200 (simulated in the tests).

**Rogan and Gladen 1978**, for 0/1 grades: `(mean_N(f) + spec - 1) / (sens + spec - 1)` with the
judge's sensitivity and specificity on the gold items; the interval is Lang and Reiczigel's 2014. It
asks only that the judge err alike on gold and other items of the same truth, and is wider.

Not covered: gold items that come in clusters, or that were picked for being hard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate

LEAST = 4
"""True grades without which nothing can be said of the judge's errors."""


def prediction_powered(
    judged: Mapping[str, float],
    gold: Mapping[str, float],
    *,
    metric: str,
    of: str = "",
    confidence: float = 0.95,
) -> Estimate:
    """The mean true grade of the items in `judged` (id -> judge's grade), from `gold` for some.

    `items` are pseudo-values (their mean is the value, their spread its error), so that two of
    these estimates are compared in pairs. Raises InputError for fewer than four gold grades, a gold
    item that was not judged, no judged item without a gold grade, or grades that are no numbers.
    """
    import numpy as np
    from scipy import special

    from deltaloom.core import _intervals

    f, y, rest, known = _sides(judged, gold, metric)
    binary = _intervals.is_binary(judged) and _intervals.is_binary(gold)
    n, m = len(known), len(rest)
    ours, truth, others = (
        np.array([side[key] for key in keys]) for side, keys in ((f, known), (y, known), (f, rest))
    )
    weights = np.ones(n)
    pairs = np.stack([truth, ours])  # (2, n)
    if binary:
        pairs = np.hstack([pairs, [[0, 0, 1, 1], [0, 1, 0, 1]]])
        weights = np.append(weights, np.full(4, 0.5))
    cov = np.cov(pairs, aweights=weights, ddof=0)
    slope = cov[0, 1] / ((1 + n / m) * cov[1, 1]) if cov[1, 1] > 0 else 0.0
    slope = float(np.clip(slope, 0.0, 1.0))
    residual = cov[0, 0] - 2 * slope * cov[0, 1] + slope**2 * cov[1, 1]
    total = float(weights.sum())
    of_gold = float(residual) / (total - 2)
    of_rest = slope**2 * float(others.var(ddof=1)) / m if m > 1 else 0.0
    stderr = math.sqrt(of_gold + of_rest)
    value = slope * float(others.mean()) + float((truth - slope * ours).mean())
    centre = slope * float(others.mean()) + float(
        np.average(pairs[0] - slope * pairs[1], weights=weights)
    )
    spread = of_gold**2 / (n - 2) + (of_rest**2 / (m - 1) if m > 1 else 0.0)
    freedom = max(1.0, (of_gold + of_rest) ** 2 / spread) if spread else n - 2.0
    reach = float(special.stdtrit(freedom, (1 + confidence) / 2)) * stderr
    low, high = centre - reach, centre + reach
    if binary:
        value = float(np.clip(value, 0.0, 1.0))
        low, high = max(low, 0.0), min(high, 1.0)
    low, high = min(low, value), max(high, value)
    pseudo = _pseudo_values(value, slope, dict(zip(known, truth - slope * ours, strict=True)),
                            {key: f[key] for key in rest})  # fmt: skip
    return _estimate(pseudo, value, stderr, low, high, metric, of, "prediction-powered", confidence)


def rogan_gladen(
    judged: Mapping[str, float],
    gold: Mapping[str, float],
    *,
    metric: str,
    of: str = "",
    confidence: float = 0.95,
) -> Estimate | None:
    """The share of true items among `judged` (id -> 0 or 1), from `gold` for some of them.

    None where the gold items lack one kind, or where the judge tells the two kinds no better than
    chance does. Raises InputError like `prediction_powered`, and for grades other than 0 and 1.
    """
    from scipy import special

    from deltaloom.core import _intervals

    f, y, rest, known = _sides(judged, gold, metric)
    if not (_intervals.is_binary(judged) and _intervals.is_binary(gold)):
        raise InputError(f"{metric}: Rogan and Gladen's correction is for grades 0 and 1 only")
    yes = [f[key] for key in known if y[key] == 1.0]
    no = [1.0 - f[key] for key in known if y[key] == 0.0]
    if not yes or not no:
        return None
    m = len(rest)
    share = sum(f[key] for key in rest) / m
    sens, spec = sum(yes) / len(yes), sum(no) / len(no)
    if sens + spec <= 1.0:
        return None
    z = float(special.ndtri((1 + confidence) / 2))
    p, size = (m * share + z * z / 2) / (m + z * z), m + z * z
    se, sp = (sum(yes) + 1) / (len(yes) + 2), (sum(no) + 1) / (len(no) + 2)
    gain = se + sp - 1
    if gain <= 0:
        return None
    value, centre = (share + spec - 1) / (sens + spec - 1), (p + sp - 1) / gain
    of_se, of_sp = se * (1 - se) / (len(yes) + 2), sp * (1 - sp) / (len(no) + 2)
    shift = 2 * z * z * (centre * of_se - (1 - centre) * of_sp)
    variance = p * (1 - p) / size + centre**2 * of_se + (1 - centre) ** 2 * of_sp
    stderr = math.sqrt(variance) / gain
    value = min(max(value, 0.0), 1.0)
    low, high = (min(max(centre + shift + side * z * stderr, 0.0), 1.0) for side in (-1, 1))
    items = {key: (grade + spec - 1) / (sens + spec - 1) for key, grade in f.items()}
    return _estimate(
        items, value, stderr, min(low, value), max(high, value), metric, of, "lang-reiczigel",
        confidence,
    )  # fmt: skip


def _sides(
    judged: Mapping[str, float], gold: Mapping[str, float], metric: str
) -> tuple[dict[str, float], dict[str, float], list[str], list[str]]:
    """Checked grades and gold, and the ids without and with a gold grade."""
    from deltaloom.core import _intervals

    f = _intervals.numbers(judged, f"{metric}: grade of", "leave it out")
    y = _intervals.numbers(gold, f"{metric}: gold grade of", "leave it out")
    unknown = next((key for key in y if key not in f), None)
    if unknown is not None:
        raise InputError(f"{metric}: item {unknown!r} has a gold grade and was not judged")
    rest = [key for key in f if key not in y]
    if len(y) < LEAST or not rest:
        raise InputError(
            f"{metric}: {len(y)} of {len(f)} judged items have a gold grade; "
            + (f"give {LEAST} or more" if len(y) < LEAST else "no correction is needed for all")
        )
    return f, y, rest, list(y)


def _pseudo_values(
    value: float, slope: float, gold: Mapping[str, Any], rest: Mapping[str, float]
) -> dict[str, float]:
    """One number an item with mean `value` whose standard error is that of the estimate."""
    total = len(gold) + len(rest)
    centre, middle = sum(gold.values()) / len(gold), sum(rest.values()) / len(rest)
    found = {
        key: value + total / len(gold) * (float(one) - float(centre)) for key, one in gold.items()
    }
    found |= {key: value + total / len(rest) * slope * (one - middle) for key, one in rest.items()}
    return dict(sorted(found.items()))


def _estimate(
    items: Mapping[str, float],
    value: float,
    stderr: float,
    low: float,
    high: float,
    metric: str,
    of: str,
    interval: str,
    confidence: float,
) -> Estimate:
    return Estimate(
        value=value,
        stderr=stderr,
        low=low,
        high=high,
        n=len(items),
        metric=metric,
        better="higher",
        of=of,
        items=dict(items),
        clusters=None,
        interval=interval,
        confidence=confidence,
    )
