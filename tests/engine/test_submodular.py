"""Greedy maximisation against exhaustive search, plain greedy and closed forms."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from deltaloom.core.errors import InputError
from deltaloom.engine import _cover, similarity, submodular
from deltaloom.engine.similarity import Blockwise, Dense, Sparse, nearest, unit_rows
from deltaloom.engine.submodular import How

BOUND = 1 - 1 / np.e


def similarities(seed, n=9, m=None, ties=False):
    """Non-negative similarities (n, m); with ties, of four values only, exact in float32."""
    random = np.random.default_rng(seed)
    shape = (n, n if m is None else m)
    return random.integers(0, 4, shape) / 4 if ties else random.random(shape)


def positive(seed, n=9):
    """A symmetric, positive semidefinite kernel without negative entries."""
    features = np.random.default_rng(seed).random((n, 5))
    return features @ features.T


def functions(seed, ties=False):
    """name -> (greedy, its kernel, the function's value of a set by definition)."""
    s = similarities(seed, ties=ties)
    queries, known = similarities(seed + 1, 3, 9, ties), similarities(seed + 2, 2, 9, ties)
    square = np.round((s + s.T) * 2) / 4 if ties else positive(seed)
    cap, low = 0.5 * queries.max(axis=0), 0.75 * known.max(axis=0)

    def best(chosen):
        return s[list(chosen)].max(axis=0) if len(chosen) else np.zeros(9)

    def volume(chosen):
        part = square[np.ix_(chosen, chosen)] / 0.5 + np.eye(len(chosen))
        return np.linalg.slogdet(part)[1]

    found = {
        "facility": (submodular.facility_location, s, lambda a: best(a).sum()),
        "flmi": (
            lambda kernel, k, **more: submodular.mutual_information(
                kernel, k, Dense.of(queries), 0.5, **more
            ),
            s,
            lambda a: np.minimum(best(a), cap).sum(),
        ),
        "flcg": (
            lambda kernel, k, **more: submodular.conditional_gain(
                kernel, k, Dense.of(known), 0.75, **more
            ),
            s,
            lambda a: np.maximum(best(a) - low, 0).sum(),
        ),
        "graphcut": (
            lambda kernel, k: submodular.graph_cut(kernel, k, 0.25),
            square,
            lambda a: square[:, list(a)].sum() - 0.25 * square[np.ix_(a, a)].sum(),
        ),
    }
    if not ties:
        found["logdet"] = (
            lambda kernel, k: submodular.log_det(kernel, k, 0.5),
            square,
            volume,
        )
    return found


NAMES = ("facility", "flmi", "flcg", "graphcut", "logdet")


def plain(value, n, budget):
    """Plain greedy from the function's values alone; of equals the first."""
    chosen = []
    for _ in range(budget):
        gains = [-np.inf if j in chosen else value([*chosen, j]) - value(chosen) for j in range(n)]
        best = max(gains)
        chosen.append(next(j for j in range(n) if gains[j] >= best - 1e-9))
    return chosen


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10_000), budget=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_greedy_reaches_its_share_of_the_optimum_and_is_plain_greedy(name, seed, budget):
    greedy, kernel, value = functions(seed)[name]
    picks = greedy(Dense.of(kernel), budget)
    chosen = picks.indices.tolist()
    assert chosen == plain(value, 9, budget)
    optimum = max(value(list(a)) for a in combinations(range(9), budget))
    assert value(chosen) >= BOUND * optimum - 1e-9
    assert picks.value == pytest.approx(value(chosen), abs=1e-5)
    assert picks.alone == pytest.approx([value([j]) for j in range(9)], abs=1e-5)


@pytest.mark.parametrize("name", ["facility", "flmi", "flcg", "graphcut"])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_of_equal_gains_the_first_is_picked_in_every_form(name, seed):
    greedy, kernel, value = functions(seed, ties=True)[name]
    wanted = plain(value, 9, 9)
    forms = [Dense.of(kernel), Sparse.of(sparse.csr_matrix(kernel))]
    if name != "graphcut":  # any matrix is a matrix of products
        forms.append(Blockwise.of(kernel, np.eye(9)))
    for form in forms:
        assert greedy(form, 9).indices.tolist() == wanted, type(form).__name__


@pytest.mark.parametrize("entries", [0, _cover.ENTRIES])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=5, deadline=None)
def test_forms_agree_while_rows_shrink(entries, seed):
    # enough candidates for several passes, to the last one, with negative similarities; products
    # and their sums are exact in float32, so there are many ties and rounding decides none
    features = np.random.default_rng(seed).integers(-4, 5, (300, 3)) / 4
    kept = _cover.ENTRIES
    _cover.ENTRIES = entries  # 0: never kept
    try:
        dense = submodular.facility_location(Dense.of(features @ features.T), 300)
        blockwise = submodular.facility_location(Blockwise.of(features), 300)
        whole = submodular.facility_location(nearest(features, 300), 300)
    finally:
        _cover.ENTRIES = kept
    products = features @ features.T
    low, wanted = np.zeros(300), []
    for _ in range(300):
        gains = np.maximum(products - low, 0).sum(axis=1)
        gains[wanted] = -1  # argmax takes the first of equals
        wanted.append(int(gains.argmax()))
        low = np.maximum(low, products[wanted[-1]])
    for found in (dense, blockwise, whole):
        assert found.indices.tolist() == wanted
        assert found.value == low.sum()


def test_lazy_evaluates_less_than_plain_greedy_would():
    features = unit_rows(np.random.default_rng(0).standard_normal((200, 8)))
    picks = submodular.facility_location(Dense.of(features @ features.T), 40)
    assert picks.evaluations < 200 * 40 / 4


@pytest.mark.parametrize("form", ["dense", "sparse", "blockwise"])
def test_stochastic_greedy(form):
    features = unit_rows(np.random.default_rng(0).standard_normal((120, 6)))
    kernel = {
        "dense": lambda: Dense.of(features @ features.T),
        "sparse": lambda: nearest(features, 120),
        "blockwise": lambda: Blockwise.of(features),
    }[form]()
    lazy = submodular.facility_location(kernel, 12)
    values = []
    for seed in range(5):
        picks = submodular.facility_location(kernel, 12, How("stochastic", 0.1, seed))
        again = submodular.facility_location(kernel, 12, How("stochastic", 0.1, seed))
        assert picks.indices.tolist() == again.indices.tolist()
        assert len(set(picks.indices.tolist())) == 12
        values.append(picks.value)
    assert len(set(values)) > 1
    assert 0.9 * lazy.value < np.mean(values) < lazy.value
    # a sample of everything is greedy itself
    every = submodular.facility_location(kernel, 12, How("stochastic", 1e-9))
    assert every.indices.tolist() == lazy.indices.tolist()


def test_stochastic_samples_alike_in_every_form():
    features = unit_rows(np.random.default_rng(1).standard_normal((150, 5)))
    how = How("stochastic", 0.2, 3)
    kernels = (Dense.of(features @ features.T), Blockwise.of(features), nearest(features, 150))
    picks = [submodular.facility_location(kernel, 30, how).indices.tolist() for kernel in kernels]
    assert picks[0] == picks[1] == picks[2]


def test_nearest_keeps_the_largest_of_each_point():
    features = np.random.default_rng(2).standard_normal((40, 3)).astype(np.float32)
    points = np.random.default_rng(3).standard_normal((25, 3)).astype(np.float32)
    products = points @ features.T  # (m, n)
    wanted = np.zeros((40, 25), np.float32)
    for i, row in enumerate(products):
        for j in np.argsort(-row)[:6]:
            wanted[j, i] = row[j]
    kernel = nearest(features, 6, points)
    assert kernel.shape == (40, 25)
    np.testing.assert_allclose(kernel.rows(slice(None)), wanted, atol=1e-6)
    both = nearest(features, 6, symmetric=True).rows(slice(None))
    assert np.array_equal(both, both.T)


def test_neighbours_come_nearest_first_and_of_equals_the_first():
    places, values = similarity.neighbours_of(
        np.eye(2), np.array([[0.5, 1], [0.5, 0], [2, 0], [0.5, 3]]), 3
    )
    assert places.tolist() == [[2, 0, 1], [3, 0, 1]]
    assert values.tolist() == [[2, 0.5, 0.5], [3, 1, 0]]


def test_blocks_of_any_size_give_the_same(monkeypatch):
    features = unit_rows(np.random.default_rng(4).standard_normal((90, 4)))
    whole = submodular.facility_location(Blockwise.of(features), 20)
    monkeypatch.setattr(similarity, "BLOCK", 500)
    monkeypatch.setattr(_cover, "FRONT", 3)
    small = submodular.facility_location(Blockwise.of(features), 20)
    assert small.indices.tolist() == whole.indices.tolist()
    cut = submodular.graph_cut(Blockwise.of(features), 20, 0.5)
    dense = submodular.graph_cut(Dense.of(features @ features.T), 20, 0.5)
    assert cut.indices.tolist() == dense.indices.tolist()


def test_log_det_of_products_equals_that_of_the_matrix():
    features = unit_rows(np.random.default_rng(5).standard_normal((60, 4)))
    dense = submodular.log_det(Dense.of(features @ features.T), 20, 0.1)
    made = submodular.log_det(Blockwise.of(features), 20, 0.1)
    assert dense.indices.tolist() == made.indices.tolist()
    part = features[dense.indices].astype(float)
    wanted = np.linalg.slogdet(np.eye(20) + part @ part.T / 0.1)[1]
    assert dense.value == pytest.approx(wanted, rel=1e-6)


def test_one_candidate_and_no_similarity_at_all():
    one = submodular.facility_location(Dense.of([[0.5]]), 1)
    assert (one.indices.tolist(), one.value) == ([0], 0.5)
    nothing = submodular.facility_location(Sparse.of(sparse.csr_matrix((4, 3))), 4)
    assert (nothing.indices.tolist(), nothing.value) == ([0, 1, 2, 3], 0.0)


def test_what_cannot_be_written_to_is_read():
    features = unit_rows(np.random.default_rng(7).standard_normal((40, 3)))
    matrix = features @ features.T
    wanted = submodular.facility_location(Dense.of(matrix), 30).indices.tolist()
    matrix.flags.writeable = features.flags.writeable = False
    assert submodular.facility_location(Dense.of(matrix), 30).indices.tolist() == wanted
    assert submodular.facility_location(Blockwise.of(features), 5).indices.tolist() == wanted[:5]


def test_a_kernel_is_left_as_it_was():
    kernel = nearest(unit_rows(np.random.default_rng(6).standard_normal((50, 3))), 10)
    before = kernel.rows(slice(None))
    submodular.facility_location(kernel, 30)
    assert np.array_equal(kernel.rows(slice(None)), before)


KERNEL = Dense.of(np.eye(5))
BROKEN = np.eye(5)
BROKEN[3, 1] = np.nan
WRONG = {
    "row 3 of the kernel has a value that is not finite": lambda: Dense.of(BROKEN),
    "row 3 of the pool has a value that is not": lambda: Sparse.of(
        sparse.csr_matrix(BROKEN), "pool"
    ),
    "row 3 of the features has a value that is not finite": lambda: Blockwise.of(BROKEN),
    "row 3 of the embeddings has a": lambda: unit_rows(BROKEN, "embeddings"),
    "must be a matrix with rows and columns, not \\(5,\\)": lambda: Dense.of(np.ones(5)),
    "must be a matrix with rows and columns, not \\(0, 5\\)": lambda: Dense.of(np.ones((0, 5))),
    "features of width 5 and of width 4": lambda: Blockwise.of(np.eye(5), np.eye(4)),
    "neighbours = 6: must be from 1 to the number of candidates, 5": lambda: nearest(np.eye(5), 6),
    "a budget of 6: must be from 1 to the number of candidates, 5": (
        lambda: submodular.facility_location(KERNEL, 6)
    ),
    "a budget of 0": lambda: submodular.log_det(KERNEL, 0),
    "the queries have similarities with 4 points and the candidates with 5": (
        lambda: submodular.mutual_information(KERNEL, 2, Dense.of(np.ones((2, 4))))
    ),
    "the given have similarities with 4 points": (
        lambda: submodular.conditional_gain(KERNEL, 2, Dense.of(np.ones((2, 4))))
    ),
    "eta = -1": lambda: submodular.mutual_information(KERNEL, 2, KERNEL, -1),
    "nu = nan": lambda: submodular.conditional_gain(KERNEL, 2, KERNEL, float("nan")),
    "ridge = 0": lambda: submodular.log_det(KERNEL, 2, 0),
    "redundancy = inf": lambda: submodular.graph_cut(KERNEL, 2, float("inf")),
    "eps = 1": lambda: submodular.facility_location(KERNEL, 2, How(eps=1)),
    "graph cut needs a symmetric kernel.*5 x 5 and not symmetric": (
        lambda: submodular.graph_cut(Dense.of(np.eye(5, k=1)), 2)
    ),
    "graph cut needs a symmetric kernel.*this one is 2 x 3": (
        lambda: submodular.graph_cut(Dense.of(np.ones((2, 3))), 2)
    ),
    "log det needs a symmetric": lambda: submodular.log_det(Blockwise.of(np.eye(5), np.eye(5)), 2),
    "log det needs all similarities": lambda: submodular.log_det(nearest(np.eye(5), 2), 2),
    "not positive semidefinite": (
        lambda: submodular.log_det(Dense.of([[0.0, 2, 2], [2, 0, 2], [2, 2, 0]]), 3)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input(message):
    with pytest.raises(InputError, match=message):
        WRONG[message]()
