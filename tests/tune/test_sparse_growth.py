"""SpIEL's parts against brute force: exchange, ranking, optimizers, the state of what stays."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deltaloom.core.adapters._sparse_product import Layout
from deltaloom.core.adapters.sparse import SparseConfig, sparse_layers
from deltaloom.engine.train import TrainSettings
from deltaloom.tune import _growth
from deltaloom.tune._reselection import Reselection
from deltaloom.tune._sparse_optimizers import AgedAdamW, CoverSM3
from deltaloom.tune._supports import overlap, split, top
from deltaloom.tune.spiel import Spiel

SIZE = 40


@st.composite
def cases(draw):
    places = draw(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=15, unique=True))
    offered = draw(st.lists(st.integers(0, SIZE - 1), max_size=15, unique=True))
    small = st.integers(-4, 4)  # ties are common
    values = draw(st.lists(small, min_size=len(places), max_size=len(places)))
    scores = draw(st.lists(st.integers(0, 4), min_size=len(offered), max_size=len(offered)))
    count = draw(st.integers(0, len(places)))
    return sorted(places), values, offered, scores, count


def slowly(places, values, offered, scores, count):
    """Drop and grow with lists and sets: what stays or comes, with the value it has."""
    order = sorted(range(len(places)), key=lambda i: (abs(values[i]), i))
    dropped = [places[i] for i in order[:count]]
    kept = {places[i] for i in order[count:]}
    ranked = sorted(range(len(offered)), key=lambda i: (-scores[i], i))
    grown = [offered[i] for i in ranked if offered[i] not in kept][:count]
    leaving = [one for one in dropped if one not in grown]
    coming = [one for one in grown if one not in dropped]
    leaving = leaving[: len(coming)]
    after = {p: v for p, v in zip(places, values, strict=True) if p not in leaving}
    return {**after, **dict.fromkeys(coming, 0)}


@settings(max_examples=200, deadline=None)
@given(cases())
def test_exchange_is_drop_and_grow(case):
    places, values, offered, scores, count = case
    indices, kept = torch.tensor(places), torch.tensor(values, dtype=torch.float32)
    found = _growth.exchange(
        kept, indices, count, torch.tensor(offered, dtype=torch.int64), torch.tensor(scores)
    )
    assert [offered[i] for i in found.chosen] == found.coming.tolist()
    indices[found.leaving], kept[found.leaving] = found.coming, 0.0
    after = dict(zip(indices.tolist(), kept.tolist(), strict=True))
    assert len(after) == len(places)
    assert after == slowly(*case)


@pytest.mark.parametrize("strip", [1, 30, 1 << 22])
@pytest.mark.parametrize("transposed", [False, True])
def test_rankings_are_those_of_the_whole_matrix(monkeypatch, strip, transposed):
    monkeypatch.setattr(_growth, "STRIP", strip)
    torch.manual_seed(0)
    layout = Layout(*((5, 8) if transposed else (8, 5)), transposed)
    g, x = torch.randn(11, 8), torch.randn(11, 5)
    whole = (x.T @ g if transposed else g.T @ x).abs().flatten()
    found = _growth.largest_gradients(g, x, layout, 9)
    assert found.tolist() == whole.argsort(descending=True)[:9].tolist()
    rows, columns, active = torch.rand(8), torch.rand(5), torch.tensor([0, 7, 23])
    products = torch.outer(columns, rows) if transposed else torch.outer(rows, columns)
    products = products.flatten()
    products[active] = -1
    found, scores = _growth.largest_products(rows, columns, layout, active, 9)
    assert found.tolist() == products.argsort(descending=True)[:9].tolist()
    assert torch.equal(scores, products[found])
    everything = _growth.largest_products(rows, columns, layout, active, 100)[0]
    assert sorted(everything.tolist()) == sorted({*range(40)} - {0, 7, 23})


def test_aged_adamw_with_equal_ages_is_torchs():
    torch.manual_seed(0)
    start = torch.randn(20)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        AgedAdamW([ours], lr=0.1, weight_decay=0.3),
        torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.3),
    ]
    for _ in range(8):
        gradient = torch.randn(20)
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours.data, theirs.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_sm3_is_the_published_recursion(transposed):
    torch.manual_seed(0)
    layout = Layout(4, 3, transposed)
    indices = torch.tensor([0, 2, 3, 7, 11])
    p = nn.Parameter(torch.randn(5, dtype=torch.float64))
    values = p.detach().clone()
    optimizer = CoverSM3([p], {p: (lambda: indices, layout)}, lr=0.1, weight_decay=0.5)
    covers = [[0.0] * 4, [0.0] * 3]  # of the stored rows and columns
    for _ in range(6):
        p.grad = torch.randn(5, dtype=torch.float64)
        fresh = [list(cover) for cover in covers]
        for z, index in enumerate(indices.tolist()):
            i, j, g = index // 3, index % 3, float(p.grad[z])
            u = min(covers[0][i], covers[1][j]) + g * g
            fresh[0][i], fresh[1][j] = max(fresh[0][i], u), max(fresh[1][j], u)
            values[z] = values[z] * (1 - 0.1 * 0.5) - 0.1 * g / (u + 1e-8) ** 0.5
        covers = fresh
        optimizer.step()
    torch.testing.assert_close(p.detach(), values)
    state = optimizer.state[p]
    stored = (state["columns"], state["rows"]) if transposed else (state["rows"], state["columns"])
    for found, wanted in zip(stored, covers, strict=True):
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


class Two(nn.Module):
    """Two linear layers that PEFT can adapt."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def trained(growth, steps, micro=1, **settings):
    """SpIEL on two layers by hand, with what dense gradients said of each update."""
    from peft import get_peft_model

    config = SparseConfig(target_modules=["a", "b"], density=0.25, seed=1)
    model = get_peft_model(Two(), config)
    method = Spiel(growth=growth, reselect=6, accumulate=2, **settings)
    companion = Reselection(model, method)
    optimizer = companion.optimizer(model, TrainSettings(epochs=1, lr=0.05, batch_size=1))
    data = torch.Generator().manual_seed(5)
    history = []
    for step in range(steps):
        state = SimpleNamespace(global_step=step, max_steps=100)
        companion.on_step_begin(None, state, None)
        optimizer.zero_grad()
        dense = []
        x, y = torch.randn(4, 6, generator=data), torch.randn(4, 5, generator=data)
        for part in range(micro):
            rows = slice(part * 4 // micro, (part + 1) * 4 // micro)
            (model(x[rows]) - y[rows]).square().sum().backward()
            dense.append(dense_gradients(model, x[rows], y[rows]))
        optimizer.step()
        before = snapshot(companion, optimizer)
        state.global_step += 1
        companion.on_step_end(None, state, None)
        history.append((before, snapshot(companion, optimizer), dense))
    return history


def dense_gradients(model, x, y):
    """Gradients of both whole weights, by autograd on plain matrices."""
    weights = {}
    for name, layer in sparse_layers(model).items():
        weight = layer.base_layer.weight.detach() + layer.get_delta_weight("default")
        weights[name] = weight.requires_grad_()
    a, b = (sparse_layers(model)[name].base_layer for name in "ab")
    hidden = (x @ weights["a"].T + a.bias.detach()).tanh()
    loss = (hidden @ weights["b"].T + b.bias.detach() - y).square().sum()
    return dict(zip("ab", torch.autograd.grad(loss, [weights["a"], weights["b"]]), strict=True))


def snapshot(companion, optimizer):
    """Layer -> index -> (value, state of the element)."""
    found = {}
    for name, layer in companion.layers.items():
        values, where = layer.sparse_values["default"], layer.sparse_indices["default"]
        assert bool((where[1:] > where[:-1]).all())
        state = optimizer.state[values]
        columns = [values.detach(), *(state[k] for k in ("age", "mean", "square") if k in state)]
        rows = torch.stack(columns, 1).tolist()
        found[name] = dict(zip(where.tolist(), rows, strict=True))
        if "rows" in state:
            found[name, "covers"] = (state["rows"].clone(), state["columns"].clone())
    return found


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_gradients_grow_what_brute_force_grows(micro):
    history = trained("gradient", 15, micro)
    for step, (before, after, _) in enumerate(history, 1):
        if step not in (2, 8, 14):
            assert before == after
            continue
        part = 1.0 if step == 2 else 0.2 * (1 - step / 100)
        phase = [dense for _, _, dense in history[step - 2 : step]]
        for name in "ab":
            old, new = before[name], after[name]
            first = phase[0][0][name].abs().flatten()
            candidates = first.argsort(descending=True)[: len(old)].tolist()
            updates = [sum(one[name] for one in dense).flatten() for dense in phase]
            scores = [abs(float(sum(u[i] for u in updates))) for i in candidates]
            places = sorted(old)
            wanted = slowly(
                places, [old[p][0] for p in places], candidates, scores, int(part * len(old))
            )
            assert set(new) == set(wanted)
            grown = set(new) - set(old)
            assert step > 2 or grown
            for place in set(new) & set(old):
                assert new[place] == old[place]  # value, age and moments, to the bit
            for place in grown:
                g = [float(u[place]) for u in updates]
                mean, square = sum(g) / 2, sum(one * one for one in g) / 2
                seeds = [0.0, 2.0, mean * (1 - 0.9**2), square * (1 - 0.999**2)]
                assert new[place] == pytest.approx(seeds, rel=1e-4)


def test_momentum_grows_what_brute_force_grows():
    history = trained("momentum", 15)
    for step, (before, after, _) in enumerate(history, 1):
        if step not in (2, 8, 14):
            continue
        part = 1.0 if step == 2 else 0.2 * (1 - step / 100)
        for name in "ab":
            old, new = before[name], after[name]
            rows, columns = before[name, "covers"]
            products = torch.outer(rows, columns).flatten().tolist()
            ranked = sorted((i for i in range(len(products)) if i not in old),
                            key=lambda i: -products[i])  # fmt: skip
            count = int(part * len(old))
            leaving = sorted(sorted(old), key=lambda i: abs(old[i][0]))[:count]
            wanted = {i: v for i, v in old.items() if i not in leaving}
            wanted |= {i: [0.0] for i in ranked[:count]}
            assert new == wanted
            assert all(torch.equal(a, b) for a, b in
                       zip(after[name, "covers"], (rows, columns), strict=True))  # fmt: skip


def test_nothing_is_exchanged_after_the_last_update():
    assert Spiel().replaced(5, 1000) == 1.0
    assert Spiel().replaced(25, 100) == pytest.approx(0.15)
    assert Spiel(decay="cosine").replaced(50, 100) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="accumulate = 9 is more than reselect = 8"):
        Spiel(accumulate=9, reselect=8)
    model = sparse_model()
    companion = Reselection(model, Spiel(accumulate=2, reselect=4))
    companion.on_step_end(None, SimpleNamespace(global_step=2, max_steps=2), None)
    assert companion.exchanged == []


def sparse_model():
    from peft import get_peft_model

    return get_peft_model(Two(), SparseConfig(target_modules=["a", "b"], density=0.25))


# Supports.


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=8), min_size=1), st.data())
def test_top_is_a_sort_over_all_weights(weights, data):
    scores = {str(n): torch.tensor(w, dtype=torch.float32) for n, w in enumerate(weights)}
    flat = [(n, i) for n, w in enumerate(weights) for i in range(len(w))]
    count = data.draw(st.integers(1, len(flat)))
    ranked = sorted(flat, key=lambda at: (-abs(weights[at[0]][at[1]]), at))[:count]
    wanted = {at for at in ranked if weights[at[0]][at[1]]}
    found = top(scores, count)
    assert {(int(n), i) for n, where in found.items() for i in where.tolist()} == wanted
    assert all(where.tolist() == sorted(where.tolist()) for where in found.values())


def test_overlap_counts_elements_of_both_over_either():
    one = {"a": torch.tensor([0, 1, 2]), "b": torch.tensor([5])}
    other = {"a": torch.tensor([2, 3]), "c": torch.tensor([5])}
    assert overlap(one, other) == pytest.approx(1 / 6)
    assert overlap(one, one) == 1.0
    assert split(torch.tensor([0, 4, 5]), {"a": 4, "b": 3})["b"].tolist() == [0, 1]
