"""Corrections for many tests against scipy, the closure principle and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from deltaloom.core.errors import InputError
from deltaloom.core.multiplicity import benjamini_hochberg, holm

pvalues = st.lists(st.floats(0, 1), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(pvalues)
def test_benjamini_hochberg_is_scipys(given):
    assert benjamini_hochberg(given) == pytest.approx(stats.false_discovery_control(given))


@settings(max_examples=60, deadline=None)
@given(pvalues)
def test_holm_closes_bonferroni(given):
    """Adjusted p: the largest Bonferroni p of all sets of hypotheses that hold this one."""
    n = len(given)
    sets = [s for size in range(1, n + 1) for s in itertools.combinations(range(n), size)]
    wanted = [max(min(1.0, len(s) * min(given[j] for j in s)) for s in sets if i in s)
              for i in range(n)]  # fmt: skip
    assert holm(given) == pytest.approx(wanted)


def test_how_often_they_are_wrong():
    rng = np.random.default_rng(0)
    family, discoveries = [], []
    for _ in range(600):
        z = rng.normal(size=20)
        z[:5] += 3.5  # five true effects
        p = 2 * stats.norm.sf(abs(z))
        family.append(any(q < 0.05 for q in holm(p)[5:]))
        made = np.array(benjamini_hochberg(p)) < 0.05
        discoveries.append(made[5:].sum() / max(1, made.sum()))
    assert 0.01 < np.mean(family) < 0.06
    assert 0.02 < np.mean(discoveries) < 0.05  # 15 / 20 of 5 %


def test_nothing_and_nonsense():
    assert benjamini_hochberg([]) == holm([]) == []
    with pytest.raises(InputError, match=r"benjamini_hochberg.*p-value"):
        benjamini_hochberg([1.5])
