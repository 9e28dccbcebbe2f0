"""Corrected judge scores: closed forms, the extremes, and coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from deltaloom.core.corrected import prediction_powered, rogan_gladen
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate, compare


def named(values, start=0):
    return {f"i{k + start:05d}": float(v) for k, v in enumerate(values)}


def drawn(rng, truth, sens, spec, n, rest=400):
    """A judge's 0/1 grades on all items and the truth of the first n, which are a random draw."""
    y = rng.random(n + rest) < truth
    f = np.where(y, rng.random(n + rest) < sens, rng.random(n + rest) >= spec)
    return named(f), named(y[:n])


def test_numbers_by_hand():
    rng = np.random.default_rng(0)
    y = rng.normal(size=90)
    f = 0.7 * y + 0.3 * rng.normal(size=90) + 1.0
    found = prediction_powered(named(f), named(y[:30]), metric="grade")
    cov = np.cov(y[:30], f[:30])
    slope = cov[0, 1] / ((1 + 30 / 60) * cov[1, 1])
    residual = y[:30] - slope * f[:30]
    assert found.value == pytest.approx(slope * f[30:].mean() + residual.mean())
    variances = residual.var() / 28, slope**2 * f[30:].var(ddof=1) / 60
    assert found.stderr == pytest.approx(math.sqrt(sum(variances)))
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 28 + variances[1] ** 2 / 59)
    reach = stats.t.ppf(0.975, freedom) * found.stderr
    assert (found.low, found.high) == pytest.approx((found.value - reach, found.value + reach))
    assert np.mean(list(found.items.values())) == pytest.approx(found.value)
    assert stats.sem(list(found.items.values())) == pytest.approx(found.stderr, rel=0.03)
    assert Estimate.from_json(found.to_json()) == found


def test_a_useless_judge_leaves_the_gold_mean():
    rng = np.random.default_rng(1)
    y = rng.normal(size=40)
    found = prediction_powered(named([2.0] * 200), named(y), metric="grade")
    assert found.value == pytest.approx(y.mean())
    assert found.stderr == pytest.approx(y.std() / math.sqrt(38))
    worse = prediction_powered(named([*-y, *rng.normal(size=160)]), named(y), metric="grade")
    assert worse.value == pytest.approx(y.mean())  # a contrary judge has no weight


def test_a_good_judge_makes_gold_go_further():
    judged, gold = drawn(np.random.default_rng(2), 0.4, 0.97, 0.97, 60)
    found = prediction_powered(judged, gold, metric="share")
    alone = Estimate.from_items(gold, metric="share")
    assert found.high - found.low < 0.6 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("truth", "sens", "spec", "n"),
    [(0.5, 0.9, 0.9, 200), (0.2, 0.9, 0.8, 50), (0.05, 0.99, 0.99, 50), (0.95, 0.9, 0.8, 20)],
)
def test_coverage_where_the_raw_judge_has_none(truth, sens, spec, n):
    rng, runs = np.random.default_rng(3), 500
    hits = dict.fromkeys(("ppi", "rogan-gladen", "raw"), 0)
    known = 0
    for _ in range(runs):
        judged, gold = drawn(rng, truth, sens, spec, n)
        found = prediction_powered(judged, gold, metric="share")
        hits["ppi"] += found.low <= truth <= found.high
        raw = Estimate.from_items(judged, metric="share")
        hits["raw"] += raw.low <= truth <= raw.high
        other = rogan_gladen(judged, gold, metric="share")
        if other is not None:
            known += 1
            hits["rogan-gladen"] += other.low <= truth <= other.high
    assert hits["ppi"] / runs > 0.93
    assert hits["rogan-gladen"] / known > 0.93
    if (truth, spec) == (0.2, 0.8):
        assert hits["raw"] / runs < 0.01


def test_rogan_gladen_inverts_the_judges_errors():
    # 40 true gold items of which 36 are seen, 60 false ones of which 12 are called true.
    gold = named([1] * 40 + [0] * 60)
    judged = named([1] * 36 + [0] * 4 + [1] * 12 + [0] * 48 + [1] * 41 + [0] * 59)
    found = rogan_gladen(judged, gold, metric="share")
    assert found.value == pytest.approx((0.41 + 0.8 - 1) / (0.9 + 0.8 - 1))
    # Lang and Reiczigel 2014 by their formulas.
    z = stats.norm.ppf(0.975)
    p, se, sp = (41 + z * z / 2) / (100 + z * z), 37 / 42, 49 / 62
    centre = (p + sp - 1) / (se + sp - 1)
    a, b = se * (1 - se) / 42, sp * (1 - sp) / 62
    shift = 2 * z * z * (centre * a - (1 - centre) * b)
    error = math.sqrt(p * (1 - p) / (100 + z * z) + centre**2 * a + (1 - centre) ** 2 * b)
    error /= se + sp - 1
    wanted = centre + shift - z * error, centre + shift + z * error
    assert (found.low, found.high) == pytest.approx(wanted)


def test_a_judge_at_chance_inverts_to_nothing():
    gold = named([1] * 4 + [0] * 4)
    assert rogan_gladen(named([1, 0] * 24), gold, metric="share") is None
    assert rogan_gladen(named([1] * 40), named([1] * 6), metric="share") is None


def test_corrected_scores_are_compared_in_pairs():
    rng = np.random.default_rng(4)
    y = rng.random(300) < 0.3
    a, b = (np.where(rng.random(300) < 0.1, ~y, y) for _ in range(2))
    gold = named(y[:80])
    one, two = (prediction_powered(named(f), gold, metric="share") for f in (a, b))
    found = compare(one, two)
    assert found.difference.value == pytest.approx(one.value - two.value)
    assert found.favours == "neither"


ALL = named([1, 0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("judged", "gold", "message"),
    [
        (ALL, named([1, 0, 1]), "give 4 or more"),
        (ALL, ALL, "no correction is needed"),
        (ALL, {"other": 1.0}, "'other' has a gold grade and was not judged"),
        ({"x": math.nan}, {}, "'x' is not a finite number"),
    ],
)
def test_what_is_refused(judged, gold, message):
    with pytest.raises(InputError, match=message):
        prediction_powered(judged, gold, metric="share")
    with pytest.raises(InputError, match="grades 0 and 1 only"):
        rogan_gladen(named([0.5] * 9), named([1] * 5), metric="share")
