"""Relevance of sources against the joint Gaussian of everything, written out."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from deltaloom.search._relevance import Evidence, Model, Source, relevance

THETA, PSI = np.array([1.5]), np.array([1.0, -1.0])


def made(seed, likes, rows=4, far=3.0):
    draw = np.random.default_rng(seed)
    sources = []
    for like in likes:
        shared, own = draw.normal(size=(rows, 1)), draw.normal(size=(rows, 2))
        psi = PSI if like else PSI + far * draw.choice([-1, 1], 2)
        values = shared @ THETA + own @ psi + 0.3 * draw.normal(size=rows)
        sources.append(Source(shared, own, values))
    model = Model(4.0, np.diag([4.0, 3.0]), PSI + 0.2 * draw.normal(size=2), 0.1 * np.eye(2), 0.09)
    return model, sources


def joint(model, sources, pattern):
    """log p(y, s, z): theta, psi and all psi_g written out as one linear Gaussian."""
    count = len(sources)
    p, q = 1, 2
    prior = np.zeros((p + q * (count + 1),) * 2)
    prior[:p, :p] = model.shared * np.eye(p)
    for k in range(count + 1):
        prior[p + q * k : p + q * (k + 1), p + q * k : p + q * (k + 1)] = model.own
    rows = []
    for k, (one, like) in enumerate(zip(sources, pattern, strict=True)):
        block = np.zeros((len(one.values), len(prior)))
        block[:, :p] = one.shared
        at = p if like else p + q * (k + 1)
        block[:, at : at + q] = one.own
        if like and model.near is not None:
            off = slice(p + q * (k + 1), p + q * (k + 2))
            prior[off, off], block[:, off] = model.near, one.own
        rows.append(block)
    proxy = np.zeros((q, len(prior)))
    proxy[:, p : p + q] = np.eye(q)
    design = np.vstack([*rows, proxy])
    n = len(design) - q
    noise = np.zeros((n + q, n + q))
    noise[:n, :n] = model.noise * np.eye(n)
    noise[n:, n:] = model.proxy_noise
    seen = np.r_[np.concatenate([one.values for one in sources]), model.proxy]
    density = multivariate_normal(np.zeros(n + q), design @ prior @ design.T + noise)
    odds = np.prod([model.share if like else 1 - model.share for like in pattern])
    return density.logpdf(seen) + np.log(odds)


def exact(model, sources):
    patterns = list(itertools.product((0, 1), repeat=len(sources)))
    logs = np.array([joint(model, sources, one) for one in patterns])
    chance = np.exp(logs - logs.max())
    return chance @ np.array(patterns) / chance.sum()


@pytest.mark.parametrize("near", [None, 0.3 * np.eye(2)])
@pytest.mark.parametrize("seed", range(3))
def test_relevance_is_the_posterior_of_the_joint_gaussian(seed, near):
    # close sources, so that no probability is 0 or 1
    model, sources = made(seed, (1, 0, 1, 0, 0), rows=2, far=0.7)
    model = replace(model, near=near)
    wanted = exact(model, sources)
    assert wanted.min() > 0.001
    np.testing.assert_allclose(relevance(Evidence(model, sources)), wanted, atol=1e-8)


def test_sampled_it_is_the_same():
    model, sources = made(4, (1, 0, 1, 0, 0), rows=2, far=0.7)
    evidence = Evidence(model, sources)
    sampled = relevance(evidence, sweeps=600, summed=0)
    np.testing.assert_allclose(sampled, relevance(evidence), atol=0.06)
    assert np.array_equal(sampled, relevance(evidence, sweeps=600, summed=0))


@pytest.mark.parametrize("seed", range(3))
def test_of_two_groups_that_agree_a_sample_takes_the_one_near_the_proxy(seed):
    draw = np.random.default_rng(seed)
    inputs = draw.normal(size=(30, 2))
    like = np.arange(30) < 15
    values = inputs @ [1.5, 1.0] + 2 * inputs[:, 1] * ~like + 0.1 * draw.normal(size=30)
    sources = [
        Source(x[None, :1], x[None, 1:], y[None]) for x, y in zip(inputs, values, strict=True)
    ]
    model = Model(4.0, np.eye(1) * 9, np.array([0.9]), np.eye(1) * 0.1, 0.01)
    found = relevance(Evidence(model, sources), seed, sweeps=60)
    assert found[like].mean() > 0.8
    assert found[~like].mean() < 0.3


def test_the_mass_is_on_the_sources_that_are_like_the_target():
    model, sources = made(0, (1, 1, 0, 0, 0), rows=12)
    found = relevance(Evidence(model, sources))
    assert found[:2].min() > 0.9
    assert found[2:].max() < 0.1


def test_without_weight_the_proxy_alone_speaks_and_with_weight_all_data():
    model, sources = made(1, (1, 1), rows=6)
    evidence = Evidence(model, sources)
    mean, covariance = evidence.weighted([0.0, 0.0])
    alone, spread = model.target()
    np.testing.assert_allclose(mean, np.r_[0.0, alone], atol=1e-10)
    np.testing.assert_allclose(covariance[1:, 1:], spread)
    design = np.vstack([np.c_[one.shared, one.own] for one in sources])
    prior = np.diag([1 / 4.0, 0, 0])
    prior[1:, 1:] = np.linalg.inv(spread)
    precision = prior + design.T @ design / model.noise
    values = np.concatenate([one.values for one in sources])
    shift = design.T @ values / model.noise + prior @ np.r_[0.0, alone]
    np.testing.assert_allclose(evidence.weighted([1.0, 1.0])[0], np.linalg.solve(precision, shift))
