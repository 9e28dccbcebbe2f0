"""Merges by element, row or matrix against float64 computations on whole tensors."""

import math

import numpy as np
import pytest
import torch
from folders import SHAPES, assert_close, loaded, merged, random_models, write
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.core.errors import InputError
from deltaloom.core.method import Sizes
from deltaloom.core.registry import get
from deltaloom.merge._order import OrderStatistics

torch.set_num_threads(1)
FULL = [name for name, shape in SHAPES.items() if math.prod(shape)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0, 1e-30]), min_size=1),
    data=st.data(),
)
def test_order_statistics_are_those_of_sorting(values, data):
    numbers = np.array(values, np.float32)
    ranks = data.draw(st.lists(st.integers(1, numbers.size), min_size=1, max_size=3))
    order = OrderStatistics(ranks)
    for scan in (0, 1):
        for start in range(0, numbers.size, 3):
            order.count(scan, numbers[start : start + 3].view(np.uint32))
        order.counted(scan)
    falling = np.sort(np.abs(numbers))[::-1]
    assert order.values().tolist() == [falling[rank - 1] for rank in ranks]
    above = [int((np.abs(numbers) > falling[rank - 1]).sum()) for rank in ranks]
    assert order.equal == [rank - more for rank, more in zip(ranks, above, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2])
def test_nearswap(tmp_path, dtype, count):
    models = random_models(count, dtype)
    got = merged(tmp_path, models, "nearswap", t=0.05)
    for name in FULL:
        a, b = (model[name].double() for model in models[-2:])
        weight = (0.05 / (b - a).abs()).clamp(max=1)
        assert_close(got[name], weight * b + (1 - weight) * a, name, a.abs() + b.abs())
        near = (b - a).abs() < 0.0499
        assert torch.equal(got[name][near], models[-1][name][near])
        assert name == "scalar" or 0 < near.double().mean() < 1


@pytest.mark.parametrize("method", ["nearswap", "arcee_fusion"])
def test_nothing_between_equals(tmp_path, method):
    models = random_models(1, torch.bfloat16)
    got = merged(tmp_path, [*models, models[1]], method)
    assert all(torch.equal(got[name], models[1][name]) for name in SHAPES)


def fused(a, b):
    """The formula of Arcee fusion by softmax and sorting."""
    p, q = (torch.softmax(x, -1) + 1e-8 for x in (b, a))
    importance = (b - a).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    falling = importance.flatten().sort().values
    low, median, high = (falling[int(q * (falling.numel() - 1))] for q in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (high - low)
    return importance, threshold


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [256, 10_000])
def test_arcee_fusion(tmp_path, dtype, block):
    models = random_models(2, dtype, step=0.5)
    got = merged(tmp_path, models, "arcee_fusion", block=block)
    for name in (name for name in FULL if name != "scalar"):
        a, b = models[1][name], models[2][name]
        importance, threshold = fused(a.double(), b.double())
        clear = (importance - threshold).abs() > 1e-5 * threshold
        assert (~clear).sum() <= 1
        wanted = torch.where(importance >= threshold, b, a)
        assert torch.equal(got[name][clear], wanted[clear])
        assert name == "norm.weight" or 0 < (wanted != a).double().mean() < 0.5


@pytest.mark.parametrize("source", [0, 1])
def test_passthrough(tmp_path, source):
    models = random_models(2, torch.bfloat16)
    models[2]["count"] = models[1]["count"] = models[0]["count"] = torch.arange(4)
    got = merged(tmp_path / "a", models, "passthrough", source=source)
    assert all(torch.equal(tensor, models[1 + source][name]) for name, tensor in got.items())
    got = merged(tmp_path / "b", models, "passthrough", source=source, scale=0.3)
    for name in FULL:
        assert_close(got[name], 0.3 * models[1 + source][name].double(), name)
    assert torch.equal(got["count"], torch.arange(4))


def test_passthrough_scales_what_an_adapter_leaves_alone(tmp_path):
    from safetensors.torch import save_file

    models = random_models(0, torch.float32)
    (base,) = write(tmp_path, models)
    (tmp_path / "delta").mkdir()
    save_file({"norm.weight": torch.ones(17)}, tmp_path / "delta" / "delta.safetensors")
    made = get("merge", "passthrough").make({"scale": 2.0})
    got = loaded(made.merge_folders(base, [tmp_path / "delta"], tmp_path / "out"))
    assert torch.equal(got["w.weight"], 2 * models[0]["w.weight"])
    assert torch.equal(got["norm.weight"], 2 * (models[0]["norm.weight"] + 1))


def sce(base, tuned, density):
    """SCE by sorting, on whole float64 tensors; also where the elected sign is a close call."""
    changes = torch.stack([x - base for x in tuned])  # (k, ...)
    if density < 1:
        variance = changes.numpy().var(0).astype(np.float32).ravel()  # compared in float32
        kept = int((variance != 0).sum() * density)
        mask = torch.zeros(variance.size, dtype=torch.float64)
        mask[np.argsort(-variance, kind="stable")[:kept].copy()] = 1
        changes = changes * mask.view(base.shape)
    weights = changes.square().reshape(len(tuned), -1).mean(1)
    weights = (weights / weights.sum()).view(-1, *[1] * base.dim())
    total = changes.sum(0)
    agrees = torch.where(total >= 0, changes > 0, changes < 0)
    mass = (weights * agrees).sum(0)
    merged = (weights * changes * agrees).sum(0) / torch.where(mass == 0, 1, mass)
    close = (total.abs() < 1e-5 * changes.abs().sum(0)) & (total != 0)
    return base + merged, close, changes.abs().sum(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("step", [0.5, 1e-5])
def test_sce(tmp_path, dtype, density, step):
    models = random_models(3, torch.float32, step=0.1)
    for i, model in enumerate(models[1:], 1):  # unequal energies; the base at zero if steps are so
        for name in SHAPES:
            moved = (model[name] - models[0][name]) * 10 * step * i
            models[i][name] = (moved + (0 if step < 1e-3 else models[0][name])).to(dtype)
    for name in SHAPES:
        models[0][name] = (models[0][name] * (step > 1e-3)).to(dtype)
    got = merged(tmp_path, models, "sce", density=density, block=300)
    for name in FULL:
        base, *tuned = (model[name].double() for model in models)
        wanted, close, size = sce(base, tuned, density)
        assert close.double().mean() < 0.02
        keep = ~close
        assert_close(got[name][keep], wanted[keep], name, (base.abs() + size)[keep])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sce_of_one_is_that_model(tmp_path, dtype):
    models = random_models(1, dtype, step=1e-2)
    got = merged(tmp_path, models, "sce")
    for name in FULL:
        assert_close(got[name], models[1][name].double(), name, models[0][name].double().abs() * 2)


def polar(matrix):
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def task_singular_vectors(changes):
    rank = min(changes[0].shape) // len(changes)
    parts = [torch.linalg.svd(change, full_matrices=False) for change in changes]
    left = torch.cat([u[:, :rank] for u, _, _ in parts], 1)
    middle = torch.cat([s[:rank] for _, s, _ in parts])
    right = torch.cat([v[:rank] for _, _, v in parts])
    return polar(left) @ middle.diag() @ polar(right)


def isotropic(changes):
    left, middle, right = torch.linalg.svd(sum(changes), full_matrices=False)
    return middle.mean() * left @ right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("method", "oracle"), [("tsv", task_singular_vectors), ("iso_c", isotropic)]
)
def test_matrices(tmp_path, dtype, method, oracle):
    models = random_models(3, dtype, step=0.5)
    got = merged(tmp_path, models, method, scale=0.8, block=256)
    for name in FULL:
        base, *tuned = (model[name].double() for model in models)
        changes = [x - base for x in tuned]
        size = base.abs() + sum(x.abs() for x in changes) + 1
        plain = base + 0.8 * sum(changes) / 3
        if name != "w.weight":
            assert_close(got[name], plain, name, size)
            continue
        wanted = base + 0.8 * oracle(changes)
        assert (wanted - plain).norm() > 0.1
        assert_close(
            got[name].float() if dtype == torch.float32 else got[name], wanted, name, 9 * size
        )


def test_tsv_of_one_is_that_model(tmp_path):
    models = random_models(1, torch.bfloat16)
    got = merged(tmp_path, models, "tsv")
    for name in SHAPES:
        assert (got[name] != models[1][name]).double().sum() <= 1
        assert torch.allclose(got[name], models[1][name], rtol=2**-7)


def test_isotropic_change_has_one_singular_value(tmp_path):
    models = random_models(2, torch.float64)
    got = merged(tmp_path, models, "iso_c")
    values = torch.linalg.svdvals(got["w.weight"] - models[0]["w.weight"])
    assert (values.max() - values.min()) < 1e-12


def test_matrices_are_planned_for():
    sizes = Sizes(0, 0.0, 0, 4 * 10**6, 5 * 10**6, 8000, 20_000_000, 3)  # four of 1000 x 1000
    blocks = get("merge", "average").make().work(sizes)
    for method in ("tsv", "iso_c"):
        whole = get("merge", method).make({"threads": 1}).work(sizes)
        assert 30 * 4e6 < whole.memory_bytes - blocks.memory_bytes / 2 < 30 * 4e6 * 2.5
        assert whole.disk_bytes == blocks.disk_bytes


CASES = [
    ("breadcrumbs", {"gamma": 0.1, "density": 0.5}, 2),
    ("della", {}, 2),
    ("sce", {"density": 0.4}, 3),
    ("nearswap", {"t": 0.05}, 2),
    ("arcee_fusion", {}, 2),
    ("passthrough", {"scale": 0.7}, 1),
    ("tsv", {}, 2),
    ("iso_c", {}, 2),
]


@pytest.mark.parametrize(("method", "values", "count"), CASES)
def test_bytes_depend_on_neither_threads_nor_blocks_nor_shards(tmp_path, method, values, count):
    models = random_models(count, torch.float32, step=0.5)
    paths, split = write(tmp_path / "one", models), write(tmp_path / "split", models, shards=3)
    results = []
    for i, (threads, block, source) in enumerate([(1, 4096, paths), (3, 257, split)]):
        made = get("merge", method).make({**values, "threads": threads, "block": block})
        out = made.merge_folders(source[0], source[1:], tmp_path / f"out{i}", seed=3)
        results.append((out / "model.safetensors").read_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("method", ["nearswap", "arcee_fusion", "sce", "breadcrumbs"])
def test_nan_is_found_in_the_output_and_named(tmp_path, method):
    models = random_models(2, torch.bfloat16)
    models[2]["norm.weight"][3] = float("nan")
    with pytest.raises(InputError, match=r"model2: tensor 'norm.weight' .* at element 3, "):
        merged(tmp_path, models, method)


@pytest.mark.parametrize(
    ("method", "count", "values", "sentence"),
    [
        ("nearswap", 3, {}, "nearswap merges two models"),
        ("arcee_fusion", 0, {}, "arcee_fusion merges two models: give two deltas"),
        ("passthrough", 2, {"source": 2}, "source 2 of 2 deltas; they count from 0"),
        ("sce", 1, {"density": 0.5}, "by the variance between models: give two deltas or more"),
        ("sce", 0, {}, "nothing to merge"),
        ("tsv", 0, {}, "nothing to merge"),
        ("iso_c", 0, {}, "nothing to merge"),
    ],
)
def test_bad_settings(tmp_path, method, count, values, sentence):
    with pytest.raises(InputError, match=sentence):
        merged(tmp_path, random_models(count, torch.float32), method, **values)
