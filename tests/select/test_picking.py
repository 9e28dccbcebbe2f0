"""Order of choice against brute force over small integers, where ties abound."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deltaloom.core.examples import Examples, parse
from deltaloom.select._picking import by_pick, chosen_for, round_robin, top

SMALL = st.integers(-2, 2).map(float)
VECTORS = hnp.arrays(np.float32, st.integers(0, 12), elements=SMALL)
MATRICES = hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=SMALL)


def brute_top(scores, count):
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def brute_round_robin(influence, count):
    unused, order = set(range(len(influence))), []
    while unused and len(order) < count:
        query = len(order) % influence.shape[1]
        best = min(unused, key=lambda i: (-influence[i, query], i))
        unused.remove(best)
        order.append(best)
    return order


@given(VECTORS, st.integers(0, 14))
def test_top_is_a_stable_sort(scores, count):
    assert top(scores, count).tolist() == brute_top(scores, count)


@given(MATRICES, st.integers(0, 11))
def test_round_robin_takes_turns(influence, count):
    assert round_robin(influence, count).tolist() == brute_round_robin(influence, count)


def test_round_robin_past_many_used_rows():
    rng = np.random.default_rng(0)
    # All queries agree, so each walks over what the others took.
    influence = rng.normal(size=(3000, 1)) + rng.normal(size=(3000, 7)) * 1e-3
    for count in (5, 400, 3000):
        assert round_robin(influence, count).tolist() == brute_round_robin(influence, count)


def test_a_shorter_order_is_the_beginning_of_a_longer():
    influence = np.random.default_rng(1).normal(size=(50, 3))
    for pick in ("top", "round_robin"):
        whole, _ = by_pick(pick, influence, 50)
        assert by_pick(pick, influence, 20)[0].tolist() == whole[:20].tolist()
        assert sorted(whole) == [*range(50)]


def test_infinite_scores_are_ordered_and_others_refused():
    scores = np.array([0.0, -np.inf, np.inf, 1.0])
    assert top(scores, 4).tolist() == [2, 3, 0, 1]
    with pytest.raises(ValueError, match="not numbers"):
        top(np.array([0.0, np.nan]), 1)
    with pytest.raises(ValueError, match="not numbers"):
        round_robin(np.array([[0.0], [np.nan]]), 1)


@given(MATRICES)
def test_each_row_is_chosen_for_the_query_that_wanted_it(influence):
    rows = len(influence)
    order, wanted = by_pick("top", influence, rows)
    assert order.tolist() == brute_top(influence.max(axis=1), rows)
    assert [influence[i, q] for i, q in zip(order, wanted, strict=True)] == [
        max(influence[i]) for i in order
    ]
    order, wanted = by_pick("round_robin", influence, rows)
    for place, (row, query) in enumerate(zip(order, wanted, strict=True)):
        left = [i for i in range(rows) if i not in order[:place]]
        assert influence[row, query] == max(influence[i, query] for i in left)


def test_reasons_follow_what_was_kept():
    pool = Examples(parse("here", "s", {"text": text, "id": text}) for text in "abcde")
    order, queries = np.array([3, 0, 4]), np.array([1, 0, 1])
    assert chosen_for(pool.take([3, 4]), pool, order, queries) == {"d": 1, "e": 1}
