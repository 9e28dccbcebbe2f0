"""The two-Gaussian mixture against scikit-learn, EM written out by hand, and closed forms."""

import math

import numpy as np
import pytest

from deltaloom.engine import mixture
from deltaloom.engine.mixture import Mixture, fit_two, lower_component


def losses(seed, n=300, gap=2.0, share=0.4):
    random = np.random.default_rng(seed)
    wrong = random.random(n) < share
    return np.where(wrong, random.normal(gap, 0.6, n), random.gamma(1.5, 0.2, n))


def em_by_hand(values, low, rounds):
    """EM from a hard split with plain loops."""
    shares = [(1.0, 0.0) if v <= low else (0.0, 1.0) for v in values]
    for number in range(rounds + 1):
        weights, means, variances = [], [], []
        for k in range(2):
            count = sum(share[k] for share in shares)
            mean = sum(s[k] * v for s, v in zip(shares, values, strict=True)) / count
            spread = sum(s[k] * (v - mean) ** 2 for s, v in zip(shares, values, strict=True))
            weights.append(count / len(values))
            means.append(mean)
            variances.append(spread / count + 1e-6)
        if number == rounds:
            return weights, means, variances
        shares = []
        for v in values:
            dens = [
                w * math.exp(-0.5 * (v - m) ** 2 / s) / math.sqrt(2 * math.pi * s)
                for w, m, s in zip(weights, means, variances, strict=True)
            ]
            shares.append((dens[0] / sum(dens), dens[1] / sum(dens)))
    return None


@pytest.mark.parametrize("seed", range(3))
def test_em_is_em(seed, monkeypatch):
    monkeypatch.setattr(mixture, "ROUNDS", 4)
    monkeypatch.setattr(mixture, "GAIN", 0.0)
    values = losses(seed, n=60)
    found = fit_two(values)
    weights, means, variances = em_by_hand(values.tolist(), mixture._best_split(values), 4)
    assert np.allclose(found.weights, weights, rtol=1e-9)
    assert np.allclose(found.means, means, rtol=1e-9)
    assert np.allclose(found.variances, variances, rtol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_scikit_learn_agrees(seed):
    gaussians = pytest.importorskip("sklearn.mixture").GaussianMixture
    values = losses(seed, n=50 * (seed + 1), gap=1.0 + 0.3 * seed, share=0.1 + 0.08 * seed)
    low = values <= mixture._best_split(values)
    start = mixture._maximised(values, np.stack([low, ~low], axis=1).astype(float))
    options = {
        "means_init": start.means[:, None],
        "weights_init": start.weights,
        "precisions_init": (1 / start.variances)[:, None, None],
    }
    # From the same start the same fit; from scikit-learn's own, which may be a worse split, one
    # that stops close by.
    for given, near in ((options, 1e-6), ({}, 0.05)):
        theirs = gaussians(n_components=2, random_state=0, **given).fit(values[:, None])
        wanted = theirs.predict_proba(values[:, None])[:, np.argmin(theirs.means_)]
        assert np.allclose(lower_component(values), wanted, atol=near)


def test_shares_are_bayes_rule():
    two = Mixture(np.array([0.3, 0.7]), np.array([0.0, 2.0]), np.array([1.0, 0.25]))
    values = np.array([-1.0, 0.5, 1.2, 30.0])
    density = [
        [w * math.exp(-((v - m) ** 2) / (2 * s)) / math.sqrt(2 * math.pi * s)
         for w, m, s in zip(two.weights, two.means, two.variances, strict=True)]
        for v in values[:3]
    ]  # fmt: skip
    found, likelihood = two.shares(values[:3])
    assert np.allclose(found, [[a / (a + b), b / (a + b)] for a, b in density], rtol=1e-12)
    assert likelihood == pytest.approx(np.mean([math.log(a + b) for a, b in density]))
    assert np.isfinite(two.shares(values)[0]).all()  # far out, where both densities are 0


def test_the_first_split_is_the_best_of_all():
    for seed in range(5):
        values = losses(seed, n=15)

        def within(cut, values=values):
            parts = values[values <= cut], values[values > cut]
            return sum(((part - part.mean()) ** 2).sum() for part in parts)

        cuts = sorted(values)[:-1]
        assert within(mixture._best_split(values)) == pytest.approx(min(map(within, cuts)))


@pytest.mark.parametrize("values", [[], [3.0], [2.0] * 5])
def test_values_that_do_not_differ_are_all_low(values):
    assert lower_component(values).tolist() == [1.0] * len(values)


def test_two_values_and_ties():
    found = lower_component([0.0, 0.0, 0.0, 1.0, 1.0])
    assert found[:3].min() > 0.999
    assert found[3:].max() < 0.001
