"""Estimates against independent oracles: scipy.stats, enumeration, hand sums and simulation."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from deltaloom.core.errors import InputError
from deltaloom.core.estimate import (
    Comparison,
    Estimate,
    compare,
    compare_seeds,
    holm,
    pool_seeds,
)


def ids(values):
    return {f"i{k:05d}": value for k, value in enumerate(values)}


def estimate(values, **settings):
    settings = {"metric": "score"} | settings
    for name in ("clusters", "weights"):
        if settings.get(name) is not None:
            settings[name] = ids(settings[name])
    return Estimate.from_items(ids(values), **settings)


def close(a, b, rel=1e-9):
    assert a == pytest.approx(b, rel=rel, abs=1e-12)


# One mean: the interval that fits the items.


@pytest.mark.parametrize(("k", "n"), [(0, 7), (1, 1), (5, 5), (164, 230), (1, 40)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_binary_items_get_wilson(k, n, confidence):
    found = estimate([1] * k + [0] * (n - k), confidence=confidence)
    oracle = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    close((found.value, found.low, found.high), (k / n, oracle.low, oracle.high))
    assert (found.interval, found.n) == ("wilson", n)


def test_numbers_get_students_t():
    values = np.random.default_rng(0).gamma(2.0, size=23)
    found = estimate(values, confidence=0.9)
    oracle = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    close((found.low, found.high), (oracle.low, oracle.high))
    close((found.value, found.stderr), (values.mean(), stats.sem(values)))
    assert found.interval == "clt-t"


def test_clustered_error_by_hand():
    # Means 3; deviations summed by cluster: a -2 - 1 = -3, b 0, c 3; 3/2 * (9 + 0 + 9) / 5^2.
    found = estimate([1, 2, 3, 4, 5], clusters=["a", "a", "b", "c", "c"])
    close(found.stderr, math.sqrt(1.5 * 18) / 5)
    close(found.high - found.value, stats.t.ppf(0.975, 2) * found.stderr)
    assert found.interval == "clustered"


def test_one_item_per_cluster_is_no_clustering():
    values = np.random.default_rng(1).normal(size=12)
    close(estimate(values, clusters=[f"c{k}" for k in range(12)]).stderr, stats.sem(values))


def test_ratio_error_by_hand():
    # Weighted residuals w (x - R), squared and summed, with n / (n - 1), over the total weight.
    x, w = np.array([2.0, 4.0, 9.0]), np.array([1.0, 3.0, 2.0])
    found = estimate(x, weights=w)
    value = (2 + 12 + 18) / 6
    close(found.value, value)
    parts = [1 * (2 - value), 3 * (4 - value), 2 * (9 - value)]
    close(found.stderr, math.sqrt(3 / 2 * sum(part**2 for part in parts)) / 6)
    assert found.interval == "ratio"


def test_clustered_ratio_equals_the_ratio_of_cluster_totals():
    x, w = np.array([2.0, 4.0, 9.0, 1.0]), np.array([1.0, 3.0, 2.0, 5.0])
    found = estimate(x, weights=w, clusters=["a", "b", "a", "b"])
    by_cluster = estimate([(2 + 18) / 3, (12 + 5) / 8], weights=[3.0, 8.0])
    close((found.value, found.stderr), (by_cluster.value, by_cluster.stderr))
    assert found.interval == "clustered-ratio"


def test_equal_weights_are_no_weights_and_zero_weight_says_nothing():
    x = np.random.default_rng(2).normal(size=9)
    plain, equal = estimate(x), estimate(x, weights=[0.25] * 9)
    close((equal.value, equal.stderr, equal.low), (plain.value, plain.stderr, plain.low))
    padded = estimate([*x, 99.0], weights=[1.0] * 9 + [0.0])
    close((padded.value, padded.stderr, padded.high), (plain.value, plain.stderr, plain.high))


def test_one_unit_claims_nothing():
    for found in (estimate([0.3]), estimate([0.3, 0.4], clusters=["a", "a"])):
        assert (found.stderr, found.low, found.high) == (math.inf, -math.inf, math.inf)
    single = estimate([1])
    assert single.stderr == math.inf
    assert 0 < single.low < single.high == 1


def test_agreeing_binary_clusters_claim_no_certainty():
    found = estimate([1] * 12, clusters=[f"c{k // 3}" for k in range(12)])
    oracle = stats.binomtest(4, 4).proportion_ci(method="wilson")  # four clusters, not twelve items
    close((found.stderr, found.low, found.high), (0.0, oracle.low, 1.0))
    assert found.interval == "clustered-wilson"


# Coverage: the interval holds the truth as often as it says.


def covered(draw, truth, runs=400):
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(runs):
        low, high = draw(rng)
        hits += low <= truth <= high
    return hits / runs


def bounds(found):
    return found.low, found.high


def paired_samples(rng):
    easy = rng.normal(size=60)  # shared difficulty
    a = (easy + rng.normal(size=60) > -0.5).astype(float)
    b = (easy + rng.normal(size=60) > 0.0).astype(float)
    return estimate(a), estimate(b)


PAIRED_TRUTH = stats.norm.cdf(0.5 / math.sqrt(2)) - 0.5


def clustered(rng):
    effect = np.repeat(rng.normal(size=30), 5)
    labels = [f"c{k // 5}" for k in range(150)]
    return bounds(estimate(effect + rng.normal(size=150), clusters=labels))


def per_token(rng):
    tokens = rng.integers(20, 200, size=80)
    losses = 2 + 30 / tokens + 0.3 * rng.normal(size=80)  # short texts are harder: R is no mean
    return bounds(estimate(losses, weights=tokens))


COVERAGE = {
    "wilson": (lambda rng: bounds(estimate(rng.random(40) < 0.85)), 0.85),
    "t": (lambda rng: bounds(estimate(rng.normal(size=6))), 0.0),
    "clustered": (clustered, 0.0),
    "ratio": (per_token, 2 + 30 / 109.5),
    "bonett-price": (
        lambda rng: bounds(compare(*paired_samples(rng), resamples=1).difference),
        PAIRED_TRUTH,
    ),
    "bootstrap": (
        lambda rng: compare(*paired_samples(rng), resamples=1000).bootstrap,
        PAIRED_TRUTH,
    ),
}


@pytest.mark.parametrize("case", COVERAGE)
def test_coverage(case):
    assert 0.92 <= covered(*COVERAGE[case]) <= 0.98


def test_ignoring_clusters_would_undercover():
    def naive(rng):
        effect = np.repeat(rng.normal(size=30), 5)
        return bounds(estimate(effect + rng.normal(size=150)))

    assert covered(naive, 0.0, runs=200) < 0.85


# Two estimates on the same items.


def pair(n=40, seed=0, better="lower"):
    rng = np.random.default_rng(seed)
    b = rng.gamma(2.0, size=n)
    a = b + rng.normal(0.2, 0.5, size=n)
    return estimate(a, of="A", better=better), estimate(b, of="B", better=better)


def gaps(comparison):
    return np.array(list(comparison.difference.items.values()))


def test_difference_is_the_paired_t_interval():
    a, b = pair()
    found = compare(a, b, confidence=0.9)
    oracle = stats.ttest_rel(list(a.items.values()), list(b.items.values()))
    interval = oracle.confidence_interval(0.9)
    close(bounds(found.difference), (interval.low, interval.high))
    quantiles = stats.t.ppf(0.95, 39) + stats.t.ppf(0.8, 39)
    close(found.mde, quantiles * stats.sem(gaps(found)))
    assert found.difference.interval == "clt-t"


def test_bootstrap_agrees_with_scipy_bca():
    found = compare(*pair())
    oracle = stats.bootstrap(
        (gaps(found),), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(3)
    ).confidence_interval
    assert found.bootstrap == pytest.approx((oracle.low, oracle.high), abs=0.008)


def test_bootstrap_follows_the_skew():
    values = np.random.default_rng(8).gamma(0.3, size=30)
    found = compare(estimate(values), estimate([0.0] * 30), resamples=20_000)
    low, high = found.bootstrap
    assert high - values.mean() > 1.4 * (values.mean() - low)
    oracle = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, rng=np.random.default_rng(3)
    ).confidence_interval
    assert (low, high) == pytest.approx((oracle.low, oracle.high), rel=0.04)


def test_clustered_bootstrap_resamples_whole_clusters():
    a, b = pair(n=60)
    labels = ids([f"c{k // 4}" for k in range(60)])
    grouped = Estimate.from_items(a.items, metric="score", better="lower", clusters=labels)
    found = compare(grouped, b)
    totals = gaps(found).reshape(15, 4).mean(axis=1)
    oracle = stats.bootstrap(
        (totals,), np.mean, n_resamples=20_000, rng=np.random.default_rng(3)
    ).confidence_interval
    assert found.bootstrap == pytest.approx((oracle.low, oracle.high), abs=0.01)
    close(found.difference.stderr, stats.sem(totals))
    assert (found.unit, found.difference.interval) == ("clusters", "clustered")


def test_few_distinct_items_and_blocks_change_nothing(monkeypatch):
    from deltaloom.core import _intervals

    rows = np.random.default_rng(0).normal(loc=(0.0, 9.0), size=(50, 2))
    whole = _intervals.bca(rows, 0.95, 5, 999)
    monkeypatch.setattr(_intervals, "DRAWS_PER_BLOCK", 700)
    assert _intervals.bca(rows, 0.95, 5, 999) == whole
    binary = np.stack([np.arange(400) % 5 == 0, np.ones(400)], axis=1).astype(float)
    low, high = _intervals.bca(binary, 0.95, 0, 20_000)  # one multinomial over two distinct rows
    scale = math.sqrt(0.2 * 0.8 / 400)
    assert (low, high) == pytest.approx((0.2 - 1.96 * scale, 0.2 + 1.96 * scale), abs=0.004)


@pytest.mark.parametrize(("up", "down"), [(9, 2), (0, 0), (5, 0), (30, 31), (4, 4)])
def test_mcnemar_is_the_exact_binomial_test(up, down):
    a = estimate([1] * up + [0] * down + [1, 0, 1], of="A")
    b = estimate([0] * up + [1] * down + [1, 0, 1], of="B")
    found = compare(a, b)
    n = up + down + 3
    close(found.p_value, stats.binomtest(up, up + down).pvalue if up + down else 1.0)
    close(found.discordance, (up + down) / n)
    assert (found.test, found.wins_a, found.wins_b) == ("mcnemar-exact", up, down)
    # Bonett and Price by hand.
    p, q = (up + 1) / (n + 2), (down + 1) / (n + 2)
    reach = stats.norm.ppf(0.975) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    close(bounds(found.difference), (max(-1, p - q - reach), min(1, p - q + reach)))
    assert found.mde > 0


def enumerated(sums):
    signs = itertools.product((-1, 1), repeat=len(sums))
    totals = [abs(math.fsum(s * v for s, v in zip(sign, sums, strict=True))) for sign in signs]
    return np.mean([total >= abs(math.fsum(sums)) - 1e-9 for total in totals])


def test_sign_flips_are_enumerated_for_few_items():
    found = compare(*pair(n=11))
    close(found.p_value, enumerated(gaps(found)))
    oracle = stats.permutation_test(
        (gaps(found),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    close(found.p_value, oracle.pvalue)
    assert found.test == "sign-flip-exact"


def test_sign_flips_of_clusters_and_of_ties():
    a = estimate([1, 1, 1, 0, 1, 1, 0, 1, 1, 0], clusters=list("aabbccddee"))
    b = estimate([0, 0, 1, 1, 0, 0, 1, 0, 0, 0])
    found = compare(a, b)
    close(found.p_value, enumerated([2, -1, 2, 0, 1]))  # d sums to 0 and is skipped
    assert found.test == "sign-flip-exact"


def test_sign_flips_are_sampled_for_many_items():
    a, b = pair(n=17)
    found = compare(a, b, resamples=20_000)
    exact = enumerated(gaps(found))  # 2^17 patterns
    assert found.test == "sign-flip-monte-carlo"
    assert found.p_value == pytest.approx(exact, abs=0.01)
    sure = compare(estimate([2.5] * 30), estimate([1.0] * 30), resamples=999)
    assert sure.p_value == 1 / 1000  # never zero


def test_weighted_difference_is_the_difference_of_the_ratios():
    rng = np.random.default_rng(4)
    x, y, w = rng.normal(size=30), rng.normal(size=30), rng.integers(1, 9, size=30)
    a, b = estimate(x, weights=w), estimate(y, weights=w)
    found = compare(a, b)
    close(found.difference.value, a.value - b.value)
    close(found.difference.stderr, estimate(x - y, weights=w).stderr)
    oracle = stats.bootstrap(
        (w * (x - y), w),
        lambda s, t, axis: s.sum(axis) / t.sum(axis),
        paired=True,
        n_resamples=9_999,
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert found.bootstrap == pytest.approx((oracle.low, oracle.high), abs=0.03)


def test_no_discordance_still_has_a_width():
    same = estimate([1, 0] * 6, clusters=list("aaabbbcccddd"))
    found = compare(same, same)
    assert found.difference.low < 0 < found.difference.high
    assert found.difference.interval == "clustered-bonett-price"
    assert (found.p_value, found.favours) == (1.0, "neither")
    assert 0 < found.mde < math.inf


numbers = st.floats(-1e6, 1e6)
cells = st.one_of(st.sampled_from([0.0, 1.0]), numbers)
label = st.sampled_from("abc")


@st.composite
def estimates(draw, count=1):
    n = draw(st.integers(1 if count == 1 else 2, 12))
    column = st.lists(draw(st.sampled_from([st.sampled_from([0.0, 1.0]), cells])), min_size=n)
    shared = {
        "better": draw(st.sampled_from(["higher", "lower"])),
        "clusters": draw(st.none() | st.lists(label, min_size=n, max_size=n)),
        "weights": draw(st.none() | st.lists(st.floats(0.01, 1e3), min_size=n, max_size=n)),
        "confidence": draw(st.sampled_from([0.95, 0.8])),
    }
    found = [
        estimate(draw(column)[:n], of=f"model {k}", missing=k, cost={"seconds": 0.1 * k}, **shared)
        for k in range(count)
    ]
    return found[0] if count == 1 else found


@settings(max_examples=60, deadline=None)
@given(estimates(count=2))
@example([estimate([0.0, 0.0]), estimate([0.0, 1e-127])])  # its cubes underflow
def test_swapping_the_sides_flips_the_sign(pair):
    here, there = (compare(*sides, resamples=50) for sides in (pair, pair[::-1]))
    scale = 1 + max(abs(gaps(here)))

    def near(x, y):
        return x == y or abs(x - y) <= 1e-9 * scale

    d, e = here.difference, there.difference
    assert near(d.value, -e.value)
    assert near(d.low, -e.high)
    assert near(d.high, -e.low)
    assert near(here.bootstrap[0], -there.bootstrap[1])
    assert near(d.stderr, e.stderr)
    assert (here.p_value, here.test) == (there.p_value, there.test)
    assert near(here.mde, there.mde)
    assert (here.wins_a, here.wins_b) == (there.wins_b, there.wins_a)
    assert {"a": "b", "b": "a"}.get(here.favours, "neither") == there.favours


def test_swapping_binary_sides_mirrors_the_bootstrap_exactly():
    a, b = paired_samples(np.random.default_rng(0))
    here, there = compare(a, b, resamples=200), compare(b, a, resamples=200)
    close(here.bootstrap, [-end for end in reversed(there.bootstrap)])


@settings(max_examples=60, deadline=None)
@given(estimates())
def test_json_round_trip(found):
    text = json.dumps(found.to_json(), allow_nan=False)
    assert Estimate.from_json(json.loads(text)) == Estimate.from_json(text) == found
    assert str(found) == str(Estimate.from_json(text))


@settings(max_examples=40, deadline=None)
@given(estimates(count=2))
def test_json_round_trip_of_comparisons_and_pools(pair):
    found = compare(*pair, resamples=20)
    assert Comparison.from_json(json.dumps(found.to_json(), allow_nan=False)) == found
    for pool in (pool_seeds(pair), pool_seeds(pair[:1])):
        assert Estimate.from_json(json.dumps(pool.to_json(), allow_nan=False)) == pool


def test_only_shared_items_are_compared():
    a = Estimate.from_items({"x": 1.5, "y": 2.0, "z": 9.0}, metric="m")
    b = Estimate.from_items({"y": 1.0, "x": 1.0, "w": 0.5, "v": 0.5}, metric="m")
    found = compare(a, b)
    assert (found.shared, found.only_a, found.only_b) == (2, 1, 2)
    assert found.difference.items == {"x": 0.5, "y": 1.0}
    assert (found.difference.value, found.difference.missing) == (0.75, 3)


@pytest.mark.parametrize(("better", "winner"), [("higher", "a"), ("lower", "b")])
def test_favours_respects_what_is_better(better, winner):
    rng = np.random.default_rng(0)
    b = rng.normal(size=20)
    a = b + 1 + 0.1 * rng.normal(size=20)
    found = compare(estimate(a, better=better, of="tuned"), estimate(b, better=better, of="base"))
    assert found.difference.value > 0
    assert found.favours == winner
    assert "favours " + {"a": "tuned", "b": "base"}[winner] in found.summary()


def test_same_seed_same_answer_and_order_of_items_is_nothing():
    a, b = pair()
    shuffled = Estimate.from_items(dict(reversed(a.items.items())), metric="score", better="lower")
    assert json.dumps(estimate(list(a.items.values()), better="lower").to_json()) == json.dumps(
        shuffled.to_json()
    )
    assert compare(a, b, seed=3) == compare(a, b, seed=3)
    assert compare(a, b, seed=3).bootstrap != compare(a, b, seed=4).bootstrap


# Several training seeds.


def test_pooled_seeds():
    rows = np.random.default_rng(5).normal(size=(4, 20)) + np.array([[0.0], [1.0], [2.0], [1.5]])
    seeds = [estimate(row, of="lora", cost={"seconds": 2.0}) for row in rows]
    found = pool_seeds(seeds)
    oracle = stats.ttest_1samp(rows.mean(axis=1), 0).confidence_interval()
    close(bounds(found), (oracle.low, oracle.high))
    close(found.stderr, stats.sem(rows.mean(axis=1)))
    close(found.stderr_items, stats.sem(rows.mean(axis=0)))
    close(list(found.items.values()), rows.mean(axis=0))
    close(found.seed_values, [one.value for one in seeds])
    assert (found.interval, found.n, found.cost) == ("seeds-t", 20, {"seconds": 8.0})
    assert "4 seeds" in found.summary()
    assert pool_seeds(seeds[:1]).stderr == math.inf


def test_pooling_leaves_out_what_a_seed_could_not_score():
    one = Estimate.from_items({"x": 1.0, "y": 2.0, "z": 4.0}, metric="m", missing=1)
    two = Estimate.from_items({"x": 2.0, "y": 3.0}, metric="m", missing=2)
    found = pool_seeds([one, two])
    assert found.items == {"x": 1.5, "y": 2.5}
    assert (found.value, found.seed_values, found.missing) == (2.0, (1.5, 2.5), 2)


def test_seeds_are_compared_in_pairs():
    rng = np.random.default_rng(6)
    a, b = rng.normal(0.5, 1, size=(5, 30)), rng.normal(size=(5, 30))
    found = compare_seeds([estimate(row) for row in a], [estimate(row) for row in b])
    oracle = stats.ttest_rel(a.mean(axis=1), b.mean(axis=1)).confidence_interval()
    close(bounds(found.difference), (oracle.low, oracle.high))
    close(found.p_value, enumerated((a - b).mean(axis=1)))
    close(found.difference.stderr_items, stats.sem((a - b).mean(axis=0)))
    assert (found.unit, found.bootstrap) == ("seeds", None)
    assert found.test == "sign-flip-exact"
    assert Comparison.from_json(found.to_json()) == found


def test_holm():
    close(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    with pytest.raises(InputError, match="p-value"):
        holm([math.nan])


# What is refused, what is written, what it costs to import.

ONE = {"x": 1.0, "y": 0.0}


@pytest.mark.parametrize(
    ("items", "given", "message"),
    [
        ({}, {}, "no items"),
        ({"x": 1.0, "q7": math.nan}, {}, "'q7'"),
        ({"x": 1.0, "q7": None}, {}, "'q7'"),
        ({7: 1.0}, {}, "ids must be text"),
        (ONE, {"clusters": {"x": "a"}}, "clusters.*'y'"),
        (ONE, {"weights": {"y": 1.0}}, "weights.*'x'"),
        (ONE, {"weights": {"x": 1.0, "y": -1.0}}, "'y' is negative"),
        (ONE, {"weights": {"x": 0.0, "y": 0.0}}, "zero"),
        (ONE, {"missing": -1}, "missing"),
        (ONE, {"better": "bigger"}, "better"),
        (ONE, {"confidence": 95}, "confidence"),
        (ONE, {"cost": {"seconds": math.inf}}, "seconds"),
    ],
)
def test_bad_items_are_refused(items, given, message):
    with pytest.raises(InputError, match=message):
        Estimate.from_items(items, metric="m", **given)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (estimate([1.0, 2.0]), estimate([1.0]), "at least 2"),
        (estimate([1.0, 2.0]), Estimate.from_items(ONE, metric="score"), "no item"),
        (estimate([1.0, 2.0]), estimate([1.0, 2.0], metric="loss"), "cannot put together"),
        (estimate([1, 2], weights=[1, 2]), estimate([1, 2], weights=[1, 3]), "weights of 'i00001'"),
        (estimate([1, 2], weights=[1, 2]), estimate([1, 2]), "one side"),
        (estimate([1, 2], clusters="ab"), estimate([1, 2], clusters="aa"), "clusters of 'i00001'"),
    ],
)
def test_bad_pairs_are_refused(a, b, message):
    with pytest.raises(InputError, match=message):
        compare(a, b)


def test_bad_lists_and_documents_are_refused():
    with pytest.raises(InputError, match="no estimates"):
        pool_seeds([])
    with pytest.raises(InputError, match="equal length"):
        compare_seeds([estimate([1.0, 2.0])] * 2, [estimate([1.0, 2.0])])
    record = estimate([0.1, 0.2]).to_json()
    for broken, message in (
        ("{", "not JSON"),
        ("[]", "JSON object"),
        (record | {"valeu": 1}, "did you mean 'value'"),
        ({k: v for k, v in record.items() if k != "low"}, "'low' is missing"),
    ):
        with pytest.raises(InputError, match=message):
            Estimate.from_json(broken)


def test_summary_lines():
    found = estimate([1] * 164 + [0] * 66, metric="accuracy")
    assert found.summary() == str(found) == "accuracy 0.713 [0.651, 0.768] (n=230)"
    grouped = estimate([1.25, 1.5], clusters="ab", of="base", missing=3, confidence=0.5)
    assert str(grouped) == "base: score 1.38 50 % [1.25, 1.50] (n=2, 2 clusters, 3 missing)"
    assert estimate([0.3]).summary() == "score 0.300 [-inf, inf] (n=1)"


def test_import_is_light():
    code = (
        "import sys, deltaloom.core.estimate as e; e.holm([0.5]);"
        "print(sorted({'numpy', 'scipy', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
