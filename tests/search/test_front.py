"""Layers and areas of fronts, against brute force and Optuna's."""

import random

import numpy as np
import pytest

from deltaloom.core.method import Trial
from deltaloom.search._front import hypervolume, ranked


def some(chance, count):
    return [(chance.randrange(8) / 8, chance.randrange(8) / 8) for _ in range(count)]


def test_the_area_is_optunas_and_that_of_a_grid():
    from optuna._hypervolume import compute_hypervolume

    chance = random.Random(0)
    for count in range(30):
        points = some(chance, count)
        # An eighth apart, so that every cell is beaten as a whole or not at all.
        beaten = [
            any(a <= x / 8 and b <= y / 8 for a, b in points) for x in range(7) for y in range(6)
        ]
        found = hypervolume(points, (7 / 8, 6 / 8))
        assert found == pytest.approx(sum(beaten) / 64)
        inside = [(a, b) for a, b in points if a <= 7 / 8 and b <= 6 / 8]
        if inside:
            theirs = compute_hypervolume(np.array(inside), np.array([7 / 8, 6 / 8]))
            assert found == pytest.approx(theirs)


def test_layers_are_what_optunas_sorting_makes():
    from optuna.study._multi_objective import _fast_non_domination_rank

    chance = random.Random(1)
    for _ in range(20):
        points = some(chance, 12)
        trials = [Trial(n, {}, {"a": a, "b": -b}) for n, (a, b) in enumerate(points)]
        trials.append(Trial(12, {}, {}, failed="diverged"))
        ranks = _fast_non_domination_rank(np.array(points))
        wanted = sorted(range(12), key=lambda n: (ranks[n], points[n][0], n))
        assert [t.number for t in ranked(trials, {"a": "lower", "b": "higher"})] == wanted
