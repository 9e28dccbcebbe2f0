"""Merges by inner products against direct float64 computations on whole tensors."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from folders import SHAPES, assert_close, loaded, merged, random_models, write
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.registry import get
from deltaloom.merge._lanes import LANES
from deltaloom.merge._rules import Linear, SelectiveTensor
from deltaloom.merge._span import SpanTensor
from deltaloom.merge._span_kernels import add_inner

torch.set_num_threads(1)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
FULL = [name for name, shape in SHAPES.items() if math.prod(shape)]


def arc(a, b, t, nearly=0.9995):
    """Between two tensors by angle, on whole vectors."""
    unit = [x / x.norm() if x.norm() else x for x in (a, b)]
    cosine = (unit[0] * unit[1]).sum().clamp(-1, 1)
    if cosine.abs() > nearly:
        return (1 - t) * a + t * b
    w = torch.acos(cosine)
    return (torch.sin((1 - t) * w) * a + torch.sin(t * w) * b) / torch.sin(w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("step", "t"), [(1.0, 0.3), (0.001, 0.3), (1.0, 0.75)])
def test_slerp(tmp_path, dtype, step, t):
    models = random_models(2, dtype, step=step)
    models[2]["scalar"] = -models[1]["scalar"]  # opposite: a straight line
    got = merged(tmp_path, models, "slerp", t=t)
    for name in FULL:
        a, b = (model[name].double() for model in models[1:])
        assert_close(got[name], arc(a, b, t), name, a.abs() + b.abs())


def test_slerp_of_one_is_with_the_base(tmp_path):
    models = random_models(1, torch.float32, step=2.0)
    got = merged(tmp_path, models, "slerp", t=0.2)
    for name in FULL:
        a, b = (model[name].double() for model in models)
        assert_close(got[name], arc(a, b, 0.2), name, a.abs() + b.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1.0, 1e-3])
def test_the_ends_come_back_to_the_bit(tmp_path, dtype, step):
    models = random_models(2, dtype, step=step)
    models[1]["norm.weight"][:3] = torch.tensor([0.0, -0.0, 1e-30], dtype=dtype)
    for t, end in ((0.0, 1), (1.0, 2)):
        got = merged(tmp_path / f"s{t}", models, "slerp", t=t)
        by_weight = merged(tmp_path / f"n{t}", models, "nuslerp", weights=[1 - t, t])
        for name in SHAPES:
            for one in (got[name], by_weight[name]):
                assert torch.equal(one, models[end][name])
                assert torch.equal(one.signbit(), models[end][name].signbit())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("origin", ["zero", "base"])
@pytest.mark.parametrize("rows", [False, True])
def test_nuslerp(tmp_path, dtype, origin, rows):
    models = random_models(2, dtype, step=0.7)
    got = merged(
        tmp_path, models, "nuslerp", weights=[1.0, 3.0], origin=origin, row_wise=rows, block=256
    )
    for name in FULL:
        start, a, b = (model[name].double() for model in models)
        start = start if origin == "base" else torch.zeros_like(start)
        if rows and a.dim() > 1:
            pairs = zip((a - start).flatten(0, -2), (b - start).flatten(0, -2), strict=True)
            wanted = torch.stack([arc(x, y, 0.75, 1 - 1e-12) for x, y in pairs]).view(a.shape)
        else:
            wanted = arc(a - start, b - start, 0.75, 1 - 1e-12)
        size = start.abs() + (a - start).abs() + (b - start).abs()
        assert_close(got[name], start + wanted, name, size + a.abs())


def tangent_mean(vectors, weights):
    """mergekit's statement of multi-SLERP, step by step: the mean, its tangent space, the way back.

    Returns the point and how far the tangent step went.
    """
    lengths = torch.stack([v.norm() for v in vectors])
    units = [v / n for v, n in zip(vectors, lengths, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units, strict=True))
    length = tangent.norm()
    point = torch.cos(length) * mean + torch.sin(length) * tangent / length.clamp(min=1e-300)
    return point * (lengths * lengths.new_tensor(weights)).sum(), length


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("origin", ["zero", "base"])
def test_multislerp_is_the_tangent_mean_whose_step_is_empty(tmp_path, dtype, origin):
    models = random_models(3, dtype, step=0.8)
    weights = [0.2, 0.5, 0.3]
    got = merged(tmp_path, models, "multislerp", weights=[2.0, 5.0, 3.0], origin=origin, block=300)
    for name in (name for name in FULL if name != "scalar"):
        start, *rest = (model[name].double() for model in models)
        start = start if origin == "base" else torch.zeros_like(start)
        vectors = [x - start for x in rest]
        wanted, step = tangent_mean(vectors, weights)
        assert step < 1e-14
        size = start.abs() + sum(v.abs() for v in vectors)
        assert_close(got[name], start + wanted, name, size)


def test_multislerp_of_opposites(tmp_path):
    models = random_models(2, torch.float32)
    for name in FULL:
        models[2][name] = -models[1][name]
    got = merged(tmp_path / "a", models, "multislerp")
    assert all((got[name] == 0).all() for name in FULL)
    got = merged(tmp_path / "b", models, "multislerp", weights=[3, 1])
    assert torch.allclose(got["w.weight"], models[1]["w.weight"])  # a direction and a length
    three = [*models, {name: torch.zeros_like(t) for name, t in models[1].items()}]
    with pytest.raises(WorkError, match=r"tensor '.*': the directions of the models cancel"):
        merged(tmp_path / "c", three, "multislerp")


def karcher_mean(vectors, weights, steps=500):
    """Gradient descent on the sphere with whole float64 vectors, to convergence."""
    lengths = [v.norm() for v in vectors]
    units = [v / n for v, n in zip(vectors, lengths, strict=True)]
    point = sum(w * u for w, u in zip(weights, units, strict=True))
    point = point / point.norm()
    for _ in range(steps):
        step = torch.zeros_like(point)
        for w, u in zip(weights, units, strict=True):
            cosine = (u * point).sum().clamp(-1, 1)
            way = u - cosine * point
            if way.norm() > 1e-12:
                step += w * torch.atan2(way.norm(), cosine) * way / way.norm()
        size = step.norm()
        if size < 1e-13:
            break
        point = torch.cos(size) * point + torch.sin(size) * step / size
        point = point / point.norm()
    return point * sum(w * n for w, n in zip(weights, lengths, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("step", [1.5, 1e-2])
def test_karcher(tmp_path, dtype, step):
    models = random_models(3, dtype, step=step)
    values = {"weights": [1, 2, 5], "max_iter": 300, "tol": 1e-13, "block": 256}
    got = merged(tmp_path, models, "karcher", **values)
    for name in (name for name in FULL if name != "scalar"):
        vectors = [model[name].double() for model in models[1:]]
        wanted = karcher_mean(vectors, [0.125, 0.25, 0.625])
        size = sum(v.abs() for v in vectors)
        assert_close(got[name], wanted, name, 10 * size)
        assert math.isclose(got[name].double().norm(), wanted.norm(), rel_tol=1e-2)


def test_karcher_is_no_plain_mean_and_stops(tmp_path):
    models = random_models(3, torch.float64, step=2.0)
    plain, one, many = (
        merged(tmp_path / str(n), models, "karcher", weights=[1, 1, 8], max_iter=n, tol=1e-13)[
            "w.weight"
        ]
        for n in (0, 1, 100)
    )
    exact = karcher_mean([model["w.weight"] for model in models[1:]], [0.1, 0.1, 0.8])
    away = [(x - exact).norm().item() for x in (plain, one, many)]
    assert away[0] > 2 * away[1] > 1e3 * away[2]


def stock(base, tuned):
    """Model stock on whole vectors."""
    changes = [x - base for x in tuned]
    pairs = [(a, b) for i, a in enumerate(changes) for b in changes[i + 1 :]]
    cosine = sum((a * b).sum() / (a.norm() * b.norm()) for a, b in pairs) / len(pairs)
    n = len(tuned)
    t = n * cosine / (1 + (n - 1) * cosine)
    return t * sum(tuned) / n + (1 - t) * base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_model_stock(tmp_path, dtype, rows, count):
    models = random_models(count + 1, dtype, step=0.3)
    shared = models.pop()  # so that changes are at acute angles
    for model in models[1:]:
        for name in SHAPES:
            moved = model[name].double() + shared[name].double() - models[0][name].double()
            model[name] = moved.to(dtype)
    got = merged(tmp_path, models, "model_stock", filter_wise=rows, block=300)
    for name in (name for name in FULL if name != "scalar"):
        base, *tuned = (model[name].double() for model in models)
        if rows and base.dim() > 1:
            flat = [x.flatten(0, -2) for x in tuned]
            each = zip(base.flatten(0, -2), *flat, strict=True)
            wanted = torch.stack([stock(x, list(rest)) for x, *rest in each]).view(base.shape)
        else:
            wanted = stock(base, tuned)
        size = base.abs() + 3 * sum((x - base).abs() for x in tuned)
        if rows and (wanted - base).abs().max() > 3 * (size - base.abs()).max():
            continue  # near the pole of t every last bit counts
        assert_close(got[name], wanted, name, size + wanted.abs())


def test_model_stock_of_equal_models_is_that_model(tmp_path):
    models = random_models(1, torch.bfloat16)
    got = merged(tmp_path, [*models, models[1], models[1]], "model_stock")
    assert all(torch.equal(got[name], models[1][name]) for name in SHAPES)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_model_and_many_times_one_come_back_to_the_bit(tmp_path, method, dtype):
    models = random_models(1, dtype)
    for times in (1, 3) if dtype != torch.float64 else (1,):
        got = merged(tmp_path / str(times), [models[0], *times * [models[1]]], method)
        assert all(torch.equal(got[name], models[1][name]) for name in SHAPES)


@pytest.mark.parametrize("method", ["multislerp", "karcher", "model_stock"])
def test_order_does_not_matter(tmp_path, method):
    base, *tuned = random_models(3, torch.float32, step=0.5)
    first = merged(tmp_path / "a", [base, *tuned], method)
    second = merged(tmp_path / "b", [base, *tuned[::-1]], method)
    for name in FULL:
        assert torch.allclose(first[name], second[name], rtol=1e-6, atol=1e-7)


CASES = [
    ("slerp", {"t": 0.3}, 2),
    ("nuslerp", {"row_wise": True, "origin": "base"}, 2),
    ("multislerp", {}, 3),
    ("karcher", {}, 3),
    ("model_stock", {"filter_wise": True}, 3),
]


@pytest.mark.parametrize(("method", "values", "count"), CASES)
def test_bytes_depend_on_neither_threads_nor_blocks_nor_shards(tmp_path, method, values, count):
    models = random_models(count, torch.float32, step=0.5)
    paths, split = write(tmp_path / "one", models), write(tmp_path / "split", models, shards=3)
    results = []
    for i, (threads, block, source) in enumerate([(1, 4096, paths), (3, 257, split)]):
        made = get("merge", method).make({**values, "threads": threads, "block": block})
        out = made.merge_folders(source[0], source[1:], tmp_path / f"out{i}")
        results.append((out / "model.safetensors").read_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize(("method", "values", "count"), CASES)
def test_nan_is_found_in_the_output_and_named(tmp_path, method, values, count):
    models = random_models(count, torch.bfloat16)
    models[1]["norm.weight"][3] = float("nan")
    with pytest.raises(InputError, match=r"model1: tensor 'norm.weight' .* at element 3, "):
        merged(tmp_path, models, method, **values)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 350), max_size=5),
    seed=st.integers(0, 99),
)
def test_inner_products_are_the_same_to_the_bit_for_every_cut(rows, columns, cuts, seed):
    x, y = np.random.default_rng(seed).standard_normal((2, rows * columns)).astype(np.float32)
    found = []
    for places in ([], cuts):
        lanes, sums = np.zeros(LANES), np.zeros(rows)
        edges = sorted({0, x.size, *(min(cut, x.size) for cut in places)})
        for start, stop in pairwise(edges):
            add_inner(x[start:stop], y[start:stop], start, columns, lanes, sums)
        found.append(sums)
        assert not lanes.any()
    assert np.array_equal(*found)
    exact = (x.astype(float) * y).reshape(rows, columns).sum(1)
    np.testing.assert_allclose(found[0], exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "count", "values", "sentence"),
    [
        ("slerp", 3, {}, "slerp merges two models: give two deltas, or one .*; got 3"),
        ("nuslerp", 1, {"origin": "base"}, "nuslerp between changes needs two deltas; got 1"),
        ("nuslerp", 2, {"weights": [1.0]}, "1 weights for 2 deltas; give one for each"),
        ("model_stock", 1, {}, "needs the angle between changes: give two deltas or more"),
        ("karcher", 2, {"weights": [1, -1]}, "the weights sum to zero"),
        ("multislerp", 2, {"weights": [1]}, "1 weights for 2 deltas"),
    ],
)
def test_bad_settings(tmp_path, method, count, values, sentence):
    with pytest.raises(InputError, match=sentence):
        merged(tmp_path, random_models(count, torch.float32), method, **values)


def test_an_adapter_is_an_end(tmp_path):
    """Changes are added to the base before the angle is taken."""
    from safetensors.torch import save_file

    models = random_models(1, torch.float32)
    base, one = write(tmp_path, models)
    change = {"w.weight": torch.randn(SHAPES["w.weight"])}
    (tmp_path / "delta").mkdir()
    save_file(change, tmp_path / "delta" / "delta.safetensors")
    made = get("merge", "slerp").make({"t": 0.4})
    got = loaded(made.merge_folders(base, [tmp_path / "delta", one], tmp_path / "out"))
    a = (models[0]["w.weight"] + change["w.weight"]).double()
    b = models[1]["w.weight"].double()
    assert_close(got["w.weight"], arc(a, b, 0.4), "w", a.abs() + b.abs())


STORED = [
    ("slerp", {}),
    ("multislerp", {}),
    ("karcher", {}),
    ("average", {}),
    ("ties", {"density": 0.4}),
    ("ties", {"density": 0.03, "weights": [0.4, -0.9, 0.3], "normalize": False, "scale": 0.7}),
    ("ties", {"sparsify": "none", "weights": [1.0, 2.0, 1.0]}),
]


@pytest.mark.parametrize(("method", "how"), STORED)
@pytest.mark.parametrize("block", [256, 1000, None])
def test_stored_bfloat16_gives_the_bytes_of_the_general_way(
    tmp_path, monkeypatch, method, how, block
):
    count = 2 if method == "slerp" else 3
    models = random_models(count, torch.bfloat16)
    settings = how if block is None else {**how, "block": block}
    quick = merged(tmp_path / "quick", models, method, **settings)
    for rule in (Linear, SpanTensor, SelectiveTensor):
        monkeypatch.setattr(rule, "takes_bits", property(lambda self: False, lambda self, on: None))
    general = merged(tmp_path / "general", models, method, **how)
    for name, tensor in general.items():
        assert torch.equal(quick[name].view(torch.int16), tensor.view(torch.int16)), name
