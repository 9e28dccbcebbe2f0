"""Agreement against scikit-learn, scipy, hand-worked tables and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from deltaloom.core.agreement import correlation, kappa, krippendorff_alpha, pabak
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate, compare


def named(values):
    return {f"i{k:04d}": v for k, v in enumerate(values)}


def raters(rng, n=80, labels=4, right=0.7):
    a = rng.integers(1, labels + 1, size=n)
    b = np.where(rng.random(n) < right, a, rng.integers(1, labels + 1, size=n))
    return a.tolist(), b.tolist()


@pytest.mark.parametrize("weights", ["none", "linear", "quadratic"])
def test_kappa_is_scikit_learns(weights):
    a, b = raters(np.random.default_rng(0))
    found = kappa(named(a), named(b), weights=weights)
    wanted = cohen_kappa_score(a, b, weights=None if weights == "none" else weights)
    assert found.value == pytest.approx(wanted)
    assert found.low < found.value < found.high


def test_the_jackknife_leaves_each_item_out():
    a, b = raters(np.random.default_rng(1), n=12, labels=2)
    found = kappa(named(a), named(b))
    each = [cohen_kappa_score(a[:k] + a[k + 1 :], b[:k] + b[k + 1 :]) for k in range(12)]
    wanted = np.sqrt(11 / 12 * ((each - np.mean(each)) ** 2).sum())
    assert found.stderr == pytest.approx(wanted)
    assert np.mean(list(found.items.values())) == pytest.approx(found.value)
    assert stats.sem(list(found.items.values())) == pytest.approx(wanted)
    assert Estimate.from_json(found.to_json()) == found


def test_alpha_of_krippendorffs_own_example():
    # Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", example C: alpha = 0.743.
    rows = [
        [1, 1, None, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4],
        [4, 4, 4, 4], [1, 1, 2, 1], [2, 2, 2, 2], [None, 5, 5, 5], [None, None, 1, 1],
        [None, None, 3, None],
    ]  # fmt: skip
    found = krippendorff_alpha(named(rows))
    assert found.value == pytest.approx(0.743, abs=5e-4)
    assert (found.n, found.missing) == (11, 1)
    assert krippendorff_alpha(named(rows), level="interval").value == pytest.approx(0.849, abs=5e-4)


@pytest.mark.parametrize("kind", ["pearson", "spearman", "kendall"])
def test_correlations_are_scipys(kind):
    rng = np.random.default_rng(2)
    a = rng.integers(1, 6, size=40)  # with ties
    b = a + rng.normal(size=40)
    oracle = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}
    found = correlation(named(a), named(b), kind=kind)
    assert found.value == pytest.approx(oracle[kind](a, b).statistic)
    assert -1 < found.low < found.value < found.high < 1


def kappa_of(rng):
    a, b = raters(rng, n=60, labels=2, right=0.6)
    return kappa(named(a), named(b))


def spearman_of(rng):
    z = rng.multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], size=40)
    return correlation(named(z[:, 0]), named(z[:, 1]))


def clustered_kappa_of(rng):
    a, b = raters(rng, n=40, labels=2, right=0.6)
    a, b = np.repeat(a, 3).tolist(), np.repeat(b, 3).tolist()
    return kappa(named(a), named(b), clusters=named([f"c{k // 3}" for k in range(120)]))


TRUTH = {
    "kappa": (kappa_of, 0.6),
    "spearman": (spearman_of, 6 / np.pi * np.arcsin(0.35)),
    "clustered": (clustered_kappa_of, 0.6),
}


@pytest.mark.parametrize("case", TRUTH)
def test_coverage(case):
    draw, truth = TRUTH[case]
    rng = np.random.default_rng(3)
    found = [draw(rng) for _ in range(150)]
    assert 0.9 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.99


def test_full_agreement_claims_no_certainty():
    labels = named(["a", "b"] * 15)
    found = kappa(labels, labels)
    low = stats.binomtest(30, 30).proportion_ci(method="wilson").low
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx((low - 0.5) / 0.5)
    ratings = {key: [one, one] for key, one in labels.items()}
    assert krippendorff_alpha(ratings).low == pytest.approx((low - 0.5) / 0.5)


def test_a_rater_who_says_one_thing_only_claims_nothing():
    found = kappa(named(["a"] * 20), named(["a", "b"] * 10))
    assert (found.value, found.low, found.high) == (0.0, -1.0, 1.0)
    assert Estimate.from_json(found.to_json()) == found


def test_pabak_does_not_mind_rare_labels():
    a = [0] * 95 + [1] * 5
    b = [0] * 90 + [1] * 5 + [0] * 5
    assert kappa(named(a), named(b)).value < 0
    found = pabak(named(a), named(b))
    assert found.value == pytest.approx(2 * 0.9 - 1)
    low = stats.binomtest(90, 100).proportion_ci(method="wilson").low
    assert found.low == pytest.approx(2 * low - 1)


def test_two_judges_are_compared_in_pairs():
    rng = np.random.default_rng(4)
    human, good = raters(rng, n=300, right=0.9)
    poor = np.where(rng.random(300) < 0.5, human, rng.integers(1, 5, size=300)).tolist()
    found = compare(kappa(named(good), named(human)), kappa(named(poor), named(human)))
    assert found.favours == "a"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kappa(named("abc"), named("abc")), "both rated 3 items"),
        (lambda: kappa(named("aaaa"), named("aaaa")), "both give 'a' to every item"),
        (lambda: kappa(named("abab"), named("abba"), weights="linear"), "labels that are numbers"),
        (lambda: correlation(named([1, 1, 1, 1]), named([1, 2, 3, 4])), "one number"),
        (lambda: krippendorff_alpha(named([[1, 1]] * 5)), "every rating is 1"),
        (lambda: krippendorff_alpha(named([[1, None]] * 5)), "0 items have two ratings"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
