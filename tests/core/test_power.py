"""Items needed against the noncentral t, published figures and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate, compare, compare_seeds, items_needed


def exact_power(difference, spread, n):
    """Power of the two-sided paired t test at 5 %, by the noncentral t."""
    shift = difference / spread * math.sqrt(n)
    edge = stats.t.ppf(0.975, n - 1)
    return stats.nct.sf(edge, n - 1, shift) + stats.nct.cdf(-edge, n - 1, shift)


@pytest.mark.parametrize(("difference", "spread"), [(0.05, 0.3), (-0.2, 0.5), (1.0, 0.7), (2, 1)])
def test_enough_and_not_one_too_many(difference, spread):
    n = items_needed(difference, spread=spread)
    # Bloom's sum of quantiles is an approximation: an item or two off for a handful of items.
    assert exact_power(abs(difference), spread, n + 1) >= 0.795
    assert exact_power(abs(difference), spread, max(2, n - 2)) < 0.8


# With normal quantiles: (1.96 + 0.8416)^2 (q - d^2) / d^2, rounded up, by hand.
BINARY = {
    (0.05, 0.1): 307,
    (0.05, 0.2): 621,
    (0.05, 0.3): 935,
    (0.03, 0.2): 1737,
    (0.10, 0.1): 71,
    (0.10, 0.3): 228,
}


@pytest.mark.parametrize("case", BINARY)
def test_binary_items(case):
    difference, discordance = case
    assert 0 <= items_needed(difference, discordance=discordance) - BINARY[case] <= 2


def test_a_pilot_of_clusters_keeps_their_size():
    rng = np.random.default_rng(0)
    labels = {f"i{k}": f"c{k // 5}" for k in range(200)}
    gaps = np.repeat(rng.normal(size=40), 5) + 0.1 * rng.normal(size=200)
    a = Estimate.from_items({f"i{k}": float(g) for k, g in enumerate(gaps)}, metric="m")
    zero = Estimate.from_items({f"i{k}": 0.0 for k in range(200)}, metric="m", clusters=labels)
    pilot = compare(a, zero)
    # What the pilot can detect takes the pilot's items; half of it about four times as many.
    assert items_needed(pilot.mde, pilot=pilot) == 200
    assert items_needed(pilot.mde / 2, pilot=pilot) / 200 == pytest.approx(4, rel=0.06)
    assert items_needed(pilot.mde, pilot=pilot) > 4 * items_needed(
        pilot.mde, spread=float(gaps.std(ddof=1))
    )


def test_the_planned_items_find_the_difference():
    n = items_needed(0.5, spread=1.0)
    draws = np.random.default_rng(1).normal(0.5, 1.0, size=(4000, n))
    found = stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.025)


PAIR = [Estimate.from_items({"x": v, "y": 2 * v, "z": 0.1}, metric="m") for v in (1.0, 2.0)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"difference": 0.1}, "none"),
        ({"difference": 0.1, "spread": 1.0, "discordance": 0.2}, "'spread', 'discordance'"),
        ({"difference": 0.0, "spread": 1.0}, "but zero"),
        ({"difference": math.nan, "spread": 1.0}, "but zero"),
        ({"difference": 0.1, "spread": -1.0}, "at least 0"),
        ({"difference": 0.3, "discordance": 0.2}, "discordance"),
        ({"difference": 0.1, "spread": 1.0, "power": 80}, "power"),
        ({"difference": 1e-9, "spread": 1.0}, "larger difference"),
        ({"difference": 0.1, "pilot": compare_seeds(PAIR, PAIR)}, "over seeds"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        items_needed(**given)
