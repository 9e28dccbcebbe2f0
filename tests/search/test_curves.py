"""The surrogate, the acquisition and the policy of quicktune against brute force."""

import math

import numpy as np
import pytest
from mpmath import mp

from deltaloom.search._acquisition import Costs, log_improvement
from deltaloom.search._past import PastTrial, Point, Task
from deltaloom.search._policy import Policy, Seen
from deltaloom.search._space import Dimension
from deltaloom.search._surrogate import Curves, Points

SPACE = {"lr": Dimension(low=1e-5, high=1e-1, log=True)}


def points(seed, count, tasks):
    draw = np.random.default_rng(seed)
    task = draw.integers(0, tasks, count)
    trial = task * 100 + draw.integers(0, 3, count)
    features = np.random.default_rng(7).normal(size=(tasks, 2))[task]
    share = draw.integers(1, 6, count) / 5
    weight = np.array([1.0, 0.3, 0.6])[task]
    return Points(draw.random((count, 2)), features, share, task, trial, weight)


def kernel(logs, a, b, i, j):
    """One entry, as the module's docstring has it."""
    every, like, own, level, trial, _, share, task, *settings = np.exp(logs)

    def matern(r):
        return (1 + math.sqrt(5) * r + 5 * r * r / 3) * math.exp(-math.sqrt(5) * r)

    x = matern(math.dist(a.settings[i] / settings, b.settings[j] / settings))
    s = matern(abs(a.share[i] - b.share[j]) / share)
    m = math.exp(-(math.dist(a.features[i], b.features[j]) ** 2) / (2 * task**2 * 2))
    same = a.task[i] == b.task[j]
    alike = every + like * m + own * same
    return alike * x * s + level * same * s + trial * (a.trial[i] == b.trial[j]) * s


def test_the_posterior_is_that_of_the_whole_gaussian():
    curves = Curves(2)
    curves.logs = np.random.default_rng(3).normal(-0.5, 0.4, len(curves.logs))
    past, target = points(0, 20, 3), points(1, 9, 1)
    values, own = np.sin(np.arange(20.0)), np.cos(np.arange(4.0))
    both = [(past, i) for i in range(20)] + [(target, i) for i in range(9)]
    whole = np.array([[kernel(curves.logs, a, b, i, j) for b, j in both] for a, i in both])
    seen, rest = [*range(20), 20, 21, 22, 23], range(20, 29)
    noise = curves.noise * np.array([*(1 / past.weight), 1, 1, 1, 1]) + 1e-8 * (np.arange(24) < 20)
    gain = whole[np.ix_(rest, seen)] @ np.linalg.inv(whole[np.ix_(seen, seen)] + np.diag(noise))
    found = curves.prior(past, values, target, 0).given([0, 1, 2, 3], own, curves.noise)
    np.testing.assert_allclose(found.mean, gain @ np.r_[values, own], atol=1e-5)
    left = whole[np.ix_(rest, rest)] - gain @ whole[np.ix_(seen, rest)]
    np.testing.assert_allclose(found.covariance, left, atol=1e-5)


def test_fitting_finds_what_matters():
    draw = np.random.default_rng(0)
    given = points(5, 120, 3)
    curves = Curves(2)
    curves.fit(given, np.sin(6 * given.settings[:, 0]) + 0.01 * draw.normal(size=120), 0)
    first, second = np.exp(curves.logs[8:])
    assert second > 3 * first
    assert curves.noise < 0.05


@pytest.mark.parametrize("u", [3.0, 0.0, -0.999, -1.001, -8.0, -40.0, -2000.0])
def test_the_log_of_expected_improvement_holds_far_out(u):
    mp.dps = 60
    exact = mp.log(0.5) + mp.log(mp.npdf(u) + u * mp.ncdf(u))
    got = log_improvement(np.array([1.0]), np.array([0.5]), np.array([1.0 + 0.5 * u]))[0]
    assert got == pytest.approx(float(exact), rel=1e-5)


def test_costs_are_learned_on_logarithms():
    draw = np.random.default_rng(1)
    x = draw.normal(size=(40, 2))
    took = np.exp(2 + 1.5 * x[:, 0] - 0.5 * x[:, 1])
    found = Costs(["a", "b"], {"a": 1.0}).predict(x[:30], took[:30], x[30:])
    np.testing.assert_allclose(found, took[30:], rtol=0.02)
    guess = Costs(["a", "b"], {"a": 1.0}).predict(np.zeros((0, 2)), np.zeros(0), x)
    np.testing.assert_allclose(guess, np.exp(x[:, 0]))


def value(lr, share, best=-3.0):
    """A curve that is low after all parts around 10^best."""
    return 1.0 + (1 - share) + 0.3 * (math.log10(lr) - best) ** 2


def task(name, best, rates):
    trials = [
        PastTrial(
            settings={"lr": lr},
            curve=[Point(share=k / 3, value=value(lr, k / 3, best), flops=1.0) for k in (1, 2, 3)],
        )
        for lr in rates
    ]
    return Task(tuner="lora", metric="loss", name=name, untuned=4.0, trials=trials)


TARGET = Task(tuner="lora", metric="loss", name="target", untuned=4.0, trials=[])
RATES = [10 ** (k / 2) for k in range(-10, -1)]
CANDIDATES = [{"lr": lr} for lr in RATES]


def play(policy, steps, best=-3.0):
    for _ in range(steps):
        asked = policy.ask()
        if asked is None:
            break
        candidate, part = asked
        policy.tell(Seen(candidate, part, value(RATES[candidate], (part + 1) / 3, best), 1.0))
    return policy


def test_the_past_says_where_to_begin():
    past = [task(str(k), -3.0, RATES[k::2]) for k in range(2)]
    policy = play(Policy(SPACE, CANDIDATES, 3, TARGET, past), 3)
    assert [(one.candidate, one.part) for one in policy.seen] == [(4, 0), (4, 1), (4, 2)]


def test_what_is_seen_overrules_a_past_that_misleads():
    past = [task(str(k), -1.5, RATES[k::2]) for k in range(2)]
    policy = play(Policy(SPACE, CANDIDATES, 3, TARGET, past), 20, -4.0)
    assert policy.best().candidate <= 3  # the past says 7, the best is 2


def test_a_past_without_weight_counts_for_nothing():
    empty = TARGET.model_copy(update={"trials": [PastTrial(settings={}, curve=[])]})
    past = [task("good", -3.0, RATES), task("bad", -1.5, RATES), empty]
    policy = Policy(SPACE, CANDIDATES, 3, TARGET, past, [1.0, 0.0, 1.0])
    assert [one.name for one in policy.past] == ["good"]
    assert policy.ask() == (4, 0)


def test_without_a_past_three_begin_and_the_best_is_found():
    policy = play(Policy(SPACE, CANDIDATES, 3, TARGET), 16)
    assert [one.candidate for one in policy.seen[:3]] == [0, 1, 2]
    assert policy.best().candidate == 4
    assert len(policy.seen) == 16


def test_a_failed_candidate_is_left_and_all_come_to_an_end():
    policy = Policy(SPACE, CANDIDATES[:4], 2, TARGET)
    policy.tell(Seen(0, 0, None, 1.0))
    policy = play(policy, 99)
    assert policy.ask() is None
    assert sum(one.candidate == 0 for one in policy.seen) == 1
    assert len(policy.seen) == 7


def test_of_equal_promise_the_cheaper_goes_on():
    space = {"epochs": Dimension(low=1, high=8, integer=True, log=True)}
    candidates = [{"epochs": k} for k in (8, 1)]
    policy = Policy(space, candidates, 2, TARGET)
    np.testing.assert_allclose(policy._costs([0, 1])[0], 8 * policy._costs([0, 1])[1])
