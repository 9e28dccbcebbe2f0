"""Proposals by processes with sparse axes: what they find, and what they must not do."""

import random

import pytest
import torch
from tiny import run_in

from deltaloom.core.errors import WorkError
from deltaloom.core.method import Trial
from deltaloom.search import _saas
from deltaloom.search._front import hypervolume
from deltaloom.search._proposing import Proposer
from deltaloom.search._space import Dimension
from deltaloom.search._study import Outcome, Study

torch.set_num_threads(1)
SIZE = Dimension(low=0, high=5, integer=True)
BIT = Dimension(low=0, high=1, integer=True)
MANY = {"a": SIZE, "b": SIZE, **{f"bit_{n}": BIT for n in range(12)}}
FEW = {"a": SIZE, "kind": Dimension(choices=["x", "y", True]), "bit": BIT}
BOTH = {"gain": "higher", "size": "lower"}


@pytest.fixture
def botorch(monkeypatch):
    """Fewer looks, for proposals that need not be the best ones."""
    pytest.importorskip("botorch")
    monkeypatch.setattr(_saas, "SAMPLES", 32)
    monkeypatch.setattr(_saas, "DRAWN", 48)
    monkeypatch.setattr(_saas, "CLIMBS", 2)


def gain(settings):
    """Three of fourteen settings matter, and they do not add up."""
    return settings["bit_5"] * (1 - (settings["a"] - 4) ** 2 / 16) + settings["b"] / 20


def both(settings):
    return [gain(settings), float(settings["a"] + settings["b"])]


def drawn(space, chance):
    return {name: one.at(chance.random()) for name, one in space.items()}


@pytest.mark.parametrize("whole", [True, False])
def test_the_best_of_what_was_not_tried_is_found(monkeypatch, whole):
    grid = _saas._Grid(FEW, [], repr)
    points = torch.cartesian_prod(*map(torch.arange, (6, 3, 2)))
    assert torch.equal(grid.points([grid.settings(point) for point in points]), points)
    assert len(grid.places(points).unique(dim=0)) == 36
    if not whole:
        monkeypatch.setattr(_saas, "ENUMERATED", 35)
        monkeypatch.setattr(_saas, "DRAWN", 2)
    for seed in range(20):
        torch.manual_seed(seed)
        weights = [torch.rand(size) for size in (6, 3, 2)]

        def score(points, weights=weights):
            return torch.stack([own[points[:, k]] for k, own in enumerate(weights)]).sum(0)

        order = points[score(points).argsort(descending=True)]
        # A sum over dimensions has one best among neighbours, and climbing ends there.
        tried = torch.cat([order[: 5 * whole], order[-3:]])
        grid = _saas._Grid(FEW, [grid.settings(point) for point in tried], repr)
        assert torch.equal(grid.best(score, order[-1:]), order[5 * whole])


def test_what_means_the_same_is_not_tried_again():
    space = {name: SIZE for name in "ab"}

    def meaning(settings):
        return settings["a"] * settings["b"] or None

    grid = _saas._Grid(space, [{"a": 5, "b": 4}, {"a": 5, "b": 5}], meaning)

    def score(points):
        return points.prod(1)

    assert grid.settings(grid.best(score, grid.points([{"a": 0, "b": 0}]))) == {"a": 4, "b": 4}
    grid.out |= {n * m for n in range(6) for m in range(6)}
    assert grid.best(score, grid.points([{"a": 0, "b": 0}])).tolist() == [5, 5]


@pytest.mark.parametrize(("way", "sign"), [("lower", -1), ("higher", 1)])
def test_what_matters_is_found_among_what_does_not(botorch, way, sign):
    chance = random.Random(0)
    known = [drawn(MANY, chance) for _ in range(16)]
    values = {n: [sign * (one["a"] + 3.0 * one["bit_5"])] for n, one in enumerate(known)}
    settings = _saas.propose(MANY, {"goal": way}, known, values, 0)
    assert (settings["a"], settings["bit_5"]) == (5, 1)


def test_fronts_hold_more_than_those_of_chance(botorch):
    for seed in range(2):
        chance = random.Random(seed)
        known = [drawn(MANY, chance) for _ in range(12)]
        values = {n: both(one) for n, one in enumerate(known)}
        more = [drawn(MANY, chance) for _ in range(5)]
        for number in range(12, 17):
            known.append(_saas.propose(MANY, BOTH, known, values, seed))
            values[number] = both(known[-1])
        assert len({str(one) for one in known}) == 17
        areas = [
            hypervolume([(-gain, size) for gain, size in map(both, some)], (0.0, 10.0))
            for some in (known, known[:12] + more)
        ]
        assert areas[0] > areas[1]


def test_what_is_going_on_counts_and_its_result_does_not(botorch):
    def proposed(late):
        proposer = Proposer(MANY, BOTH, 6, 3, ahead=2, surrogate="saas")
        done = {}
        for number in range(5):
            settings = proposer.propose(number, done)
            done[number] = Trial(number, settings, dict(zip(BOTH, both(settings), strict=True)))
        if late is None:
            del done[4]
        else:
            done[4].values["gain"] = late
        return proposer.propose(5, done), proposer.known

    settings, known = proposed(None)
    assert proposed(100.0)[0] == settings
    assert settings not in [known[number] for number in range(5)]


def test_interrupted_and_resumed_is_the_same_search_with_failures_in_it(botorch, tmp_path):
    def attempt(settings, run):
        if settings["bit_3"]:
            raise WorkError("the loss is nan at step 3")
        return Outcome(dict(zip(BOTH, both(settings), strict=True)))

    def searched(name, attempt):
        with run_in(tmp_path / name) as run:
            return Study(run, MANY, BOTH, 7, surrogate="saas").explore(attempt)

    whole = searched("whole", attempt)
    assert {trial.failed is None for trial in whole} == {True, False}
    assert len({str(trial.settings) for trial in whole}) == 7
    count = 0

    def killed(settings, run):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return attempt(settings, run)

    with pytest.raises(KeyboardInterrupt):
        searched("run", killed)
    assert searched("run", killed) == whole
    assert count == 8


@pytest.mark.parametrize("found", [[[2.0, 1.0]], [[1.0, 1.0]] * 4, [[1e9, 0.0], [0.0, 1.0]] * 3])
def test_few_equal_and_wild_results_are_no_obstacle(botorch, found):
    known = [drawn(FEW, random.Random(n)) for n in range(len(found))]
    settings = _saas.propose(FEW, BOTH, known, dict(enumerate(found)), 0)
    assert settings not in known
    assert _saas.propose(FEW, BOTH, known, dict(enumerate(found)), 0) == settings


def test_ranges_of_real_numbers_are_refused():
    with pytest.raises(ValueError, match="x is a range of real numbers"):
        _saas._Grid({"x": Dimension(low=0.0, high=1.0)}, [], repr)
