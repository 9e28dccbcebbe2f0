"""Mixture regression: laws against laws that made the data, the optimum against a grid."""

import itertools
import json

import numpy as np
import pytest
import tiny
from scipy.optimize import approx_fprime

from deltaloom.core.base import Base
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.select import _laws
from deltaloom.select.regress import Regress, drawn_mixtures, read_trials

WORTH = np.array([3.0, 1.0, 0.05])


def power(shares, floor=1.5, worth=WORTH):
    return floor + (shares @ worth + 0.1) ** -0.5


def loglinear(shares):
    return 0.5 + np.exp(0.3 + shares @ np.array([-1.5, 0.2, 0.8]))


@pytest.fixture
def shares():
    return np.random.default_rng(0).dirichlet(np.ones(3), 40)


@pytest.mark.parametrize(("kind", "made_by"), [("power", power), ("loglinear", loglinear)])
def test_a_law_finds_the_law_that_made_the_losses(kind, made_by, shares):
    noise = np.random.default_rng(1).normal(scale=0.002, size=40)
    law = _laws.fit(kind, shares, made_by(shares) + noise, 0)
    fresh = np.random.default_rng(2).dirichlet(np.ones(3), 50)
    spread = made_by(fresh).std()
    assert np.abs(law.predict(fresh) - made_by(fresh)).max() < 0.1 * spread
    # Its gradient is that of its predictions.
    w, step = fresh[0], 1e-6
    numeric = [
        (law.predict((w + step * e)[None]) - law.predict((w - step * e)[None]))[0] / (2 * step)
        for e in np.eye(3)
    ]
    assert law.gradient(w) == pytest.approx(numeric, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("kind", ["power", "loglinear"])
def test_solvers_get_the_slopes_of_what_they_solve(kind, shares, monkeypatch):
    asked = []
    solve = _laws.least_squares

    def watched(off, begin, slopes, **how):
        asked.append((slopes(begin), approx_fprime(begin, off)))
        return solve(off, begin, slopes, **how)

    monkeypatch.setattr(_laws, "least_squares", watched)
    _laws.fit(kind, shares, power(shares), 0)
    for found, wanted in asked:
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert asked


@pytest.mark.parametrize("kind", ["power", "loglinear"])
def test_losses_that_hardly_differ_are_fitted_without_overflow(kind):
    rng = np.random.default_rng(4)
    shares, losses = rng.dirichlet(np.ones(12), 32), 4.0 + 1e-3 * rng.normal(size=32)
    law = _laws.fit(kind, shares, losses, 0)
    assert np.isfinite(law.predict(shares)).all()
    assert np.abs(law.predict(shares) - losses).max() < 0.01


def grid(caps, parts=200):
    points = [
        (a / parts, b / parts, 1 - (a + b) / parts)
        for a, b in itertools.product(range(parts + 1), repeat=2)
        if a + b <= parts
    ]
    points = np.array(points)
    return points[(points <= caps + 1e-12).all(1)]


@pytest.mark.parametrize("caps", [[1.0, 1.0, 1.0], [0.3, 0.6, 1.0], [0.5, 0.5, 0.2]])
def test_the_optimum_is_that_of_a_grid_and_its_bound_holds(caps, shares):
    caps = np.array(caps)
    # Two targets that want different sources: the optimum is inside.
    losses = [power(shares), power(shares, worth=WORTH[::-1])]
    laws = [_laws.fit("power", shares, own, 0) for own in losses]
    w, gap = _laws.best(laws, caps, shares, np.random.default_rng(0))
    assert w.sum() == pytest.approx(1)
    assert (w >= 0).all()
    assert (w <= caps + 1e-9).all()

    def mean(points):
        return np.mean([law.predict(points) for law in laws], axis=0)

    assert mean(w[None])[0] <= mean(grid(caps)).min() + 1e-9
    assert 0 <= gap + 1e-12 < 1e-5


def test_the_nearest_feasible_point_is_nearest():
    rng = np.random.default_rng(3)
    caps = np.array([0.3, 0.6, 0.9])
    points = grid(caps, 100)
    for w in rng.normal(size=(20, 3)):
        ours = _laws._feasible(w, caps)
        assert ours.sum() == pytest.approx(1)
        nearest = points[((points - w) ** 2).sum(1).argmin()]
        assert ((ours - w) ** 2).sum() <= ((nearest - w) ** 2).sum() + 1e-9


def test_trees_find_a_good_mixture_within_the_caps(shares):
    pytest.importorskip("sklearn")
    caps = np.array([0.6, 1.0, 1.0])
    law = _laws.fit("trees", shares, power(shares), 0)
    w, gap = _laws.best([law], caps, shares, np.random.default_rng(0))
    assert w.sum() == pytest.approx(1)
    assert (w <= caps + 1e-9).all()
    assert power(w[None])[0] < np.quantile(power(grid(caps)), 0.2)
    assert gap == float("inf")


def test_mixtures_are_spread_around_the_pools():
    amounts = {"a": 400, "b": 100, "c": 25}
    found = np.array([[one[n] for n in amounts] for one in drawn_mixtures(amounts, 600, 0)])
    mean = found.mean(0) / found.mean(0).sum()
    assert mean == pytest.approx([20 / 35, 10 / 35, 5 / 35], abs=0.05)
    assert found.min() >= 2e-4
    assert found.std(0).min() > 0.1


@pytest.fixture
def setting(tmp_path):
    base = Base(model=str(tiny.base_in(tmp_path / "base")))
    with open(tmp_path / "pool.jsonl", "w") as pool, open(tmp_path / "target.jsonl", "w") as goal:
        for i in range(24):
            who = tiny.PEOPLE[i % 6]
            row = {"prompt": f"where lives {who} ?" + " yes" * (i // 6), "completion": "oslo"}
            pool.write(json.dumps({**row, "source": "right"}) + "\n")
            pool.write(json.dumps({**row, "source": "wrong", "completion": "lima"}) + "\n")
            goal.write(json.dumps({**row, "group": "lives"}) + "\n")
    return base, Examples.read(tmp_path / "pool.jsonl"), Examples.read(tmp_path / "target.jsonl")


def test_proxies_tell_the_right_source_and_their_trials_serve_again(setting, tmp_path):
    base, pool, target = setting
    run = tiny.run_in(tmp_path / "run", seed=1)
    method = Regress(runs=8, steps=4, tuning={"r": 2, "lr": 3e-2, "batch_size": 4})
    found = method.select(pool, run, target=target, base=base)
    assert found.weights.weights["right"] > 0.9
    about = found.weights.about
    assert about["worth"]["lives"]["right"] == 1
    assert len(found.chosen) == 12
    trials = [json.loads(one) for one in (run.folder / "trials.jsonl").read_text().splitlines()]
    assert len(trials) == 8
    assert all(sum(one["weights"].values()) == pytest.approx(1) for one in trials)
    again = Regress(trials=str(run.folder / "trials.jsonl"))
    second = again.select(pool, tiny.run_in(tmp_path / "two", seed=1), target=target, base=base)
    assert second.chosen.ids == found.chosen.ids


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"weights": {"right": 1}}, "'losses' must map"),
        ({"weights": {"right": "x"}, "losses": {"t": 1}}, "'weights' must map"),
        ({"weights": {"other": 1}, "losses": {"t": 1}}, "no source 'other'"),
        ({"weights": {"right": -1, "wrong": 2}, "losses": {"t": 1}}, "at least 0"),
        ({"weights": {"right": 1}, "losses": {"u": 1}}, "other targets"),
    ],
)
def test_bad_trials_are_named(line, says, tmp_path):
    fine = {"weights": {"right": 1, "wrong": 1}, "losses": {"t": 1.0}}
    path = tmp_path / "trials.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [fine, line]))
    with pytest.raises(InputError, match="line 2") as error:
        read_trials(path, {"right", "wrong"})
    assert says in str(error.value)


def test_bad_input_is_said(setting, tmp_path):
    base, pool, target = setting
    run = tiny.run_in(tmp_path / "run")
    path = tmp_path / "few.jsonl"
    path.write_text('{"weights": {"right": 1}, "losses": {"t": 1}}\n')
    with pytest.raises(InputError, match="has 1 runs; a law needs 8"):
        read_trials(path, {"right"})
    one = Examples([row for row in pool if row.source == "right"], "one.jsonl")
    with pytest.raises(InputError, match="one source only"):
        Regress().select(one, run, target=target, base=base)
    lines = (
        {"weights": {"right": k + 1, "wrong": 1}, "losses": {"t": 1 / (k + 1)}} for k in range(8)
    )
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    with pytest.raises(InputError, match="size = 60 examples is more than the pool has"):
        Regress(trials=str(path), size=60).select(pool, run, target=target, base=base)
