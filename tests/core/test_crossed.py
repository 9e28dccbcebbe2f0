"""Seeds and items as random effects, against an analysis of variance and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from deltaloom.core.estimate import Comparison, Estimate, compare_seeds, pool_seeds


def runs(grid, **settings):
    labels = [f"i{k:03d}" for k in range(grid.shape[1])]
    return [
        Estimate.from_items(dict(zip(labels, row, strict=True)), metric="m", **settings)
        for row in grid.tolist()
    ]


def drawn(rng, seeds=5, items=30, seed_sd=1.0, item_sd=1.0, rest_sd=1.0):
    return (
        seed_sd * rng.normal(size=(seeds, 1))
        + item_sd * rng.normal(size=(1, items))
        + rest_sd * rng.normal(size=(seeds, items))
    )


def residual(columns, y):
    """Sum of squares that a least-squares fit on dummy columns leaves."""
    fit, *_ = np.linalg.lstsq(columns, y, rcond=None)
    return float(((y - columns @ fit) ** 2).sum())


def anova(grid):
    """Mean squares of seeds, items and rest, from nested regressions."""
    seeds, items = grid.shape
    y = grid.ravel()
    one = np.ones((seeds * items, 1))
    by_seed = np.kron(np.eye(seeds), np.ones((items, 1)))
    by_item = np.kron(np.ones((seeds, 1)), np.eye(items))
    whole = residual(one, y)
    rest = residual(np.hstack([by_seed, by_item]), y)
    ms = (whole - residual(by_seed, y)) / (seeds - 1), (whole - residual(by_item, y)) / (items - 1)
    return *ms, rest / ((seeds - 1) * (items - 1))


def test_the_error_is_that_of_the_analysis_of_variance():
    grid = drawn(np.random.default_rng(0), seeds=4, items=12)
    found = pool_seeds(runs(grid), items="random")
    of_seeds, of_items, rest = anova(grid)
    variance = (of_seeds + of_items - rest) / grid.size
    assert found.stderr == pytest.approx(math.sqrt(variance))
    freedom = (of_seeds + of_items - rest) ** 2 / (
        of_seeds**2 / 3 + of_items**2 / 11 + rest**2 / 33
    )
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    assert (found.low, found.high) == pytest.approx((grid.mean() - reach, grid.mean() + reach))
    assert found.interval == "seeds-items-t"
    assert Estimate.from_json(found.to_json()) == found


def test_items_that_vary_less_than_noise_add_nothing():
    rng = np.random.default_rng(1)
    grid = rng.normal(size=(6, 10))
    grid -= grid.mean(axis=0)  # all items alike
    grid += rng.normal(size=(6, 1))
    random, fixed = pool_seeds(runs(grid), items="random"), pool_seeds(runs(grid))
    assert (random.stderr, random.low) == pytest.approx((fixed.stderr, fixed.low))


COVERAGE = {"both": (1.0, 1.0), "items": (0.0, 2.0), "seeds": (1.0, 0.0)}


@pytest.mark.parametrize("case", COVERAGE)
def test_coverage_of_new_seeds_and_new_items(case):
    rng, (seed_sd, item_sd) = np.random.default_rng(2), COVERAGE[case]
    hits = {"random": 0, "fixed": 0}
    for _ in range(400):
        estimates = runs(drawn(rng, seed_sd=seed_sd, item_sd=item_sd))
        for items in hits:
            found = pool_seeds(estimates, items=items)
            hits[items] += found.low <= 0 <= found.high
    assert 0.92 <= hits["random"] / 400 <= 0.985
    if case == "items":
        assert hits["fixed"] / 400 < 0.8  # what the seeds alone say of new items


def test_clusters_are_units_and_weights_make_a_ratio():
    rng = np.random.default_rng(3)
    base = drawn(rng, seeds=4, items=10)
    fine = np.repeat(base, 3, axis=1)
    labels = {f"i{k:03d}": f"c{k // 3}" for k in range(30)}
    grouped = pool_seeds(runs(fine, clusters=labels), items="random")
    plain = pool_seeds(runs(base), items="random")
    assert (grouped.stderr, grouped.low) == pytest.approx((plain.stderr, plain.low))
    weights = dict.fromkeys(labels, 2.5)
    weighted = pool_seeds(runs(fine, clusters=labels, weights=weights), items="random")
    assert (weighted.value, weighted.stderr) == pytest.approx((plain.value, plain.stderr))


def test_comparisons_over_seeds_and_items():
    rng = np.random.default_rng(4)
    a, b = drawn(rng) + 0.3, drawn(rng)
    found = compare_seeds(runs(a), runs(b), items="random")
    gap = pool_seeds(runs(a - b), items="random")
    assert (found.difference.stderr, found.difference.low) == pytest.approx((gap.stderr, gap.low))
    assert found.p_value == compare_seeds(runs(a), runs(b)).p_value
    assert found.difference.stderr > compare_seeds(runs(a), runs(b)).difference.stderr
    assert Comparison.from_json(found.to_json()) == found


def test_one_seed_claims_nothing():
    found = pool_seeds(runs(np.ones((1, 4))), items="random")
    assert (found.value, found.stderr, found.low) == (1.0, math.inf, -math.inf)
