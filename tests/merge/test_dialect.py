"""Rules with settings of their own for each model and tensor, beside the methods they are of."""

import pytest
import torch
from folders import loaded, merged, random_models, write

from deltaloom.core.errors import InputError
from deltaloom.merge._dialect import ByTensor, Each, dialect, dialects
from deltaloom.merge._rules import Selective
from deltaloom.merge._stream import merge_folders

FAMILY = ("ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della")


def build(method, weights=(0.5, 0.7), densities=(0.4, 0.4), seed=0, **shared):
    one = dialect(method, "c")
    values = {p.name: p.default for p in one.shared} | shared
    own = {p.name: p.default for p in one.own}
    pairs = zip(weights, densities, strict=True)
    each = [{**own, "weight": w, "density": d} for w, d in pairs]
    return one.build(method, values, each, True, seed)


def run(folder, models, rule):
    folder.mkdir()
    base, *deltas = write(folder, models)
    return loaded(merge_folders(base, deltas, rule, folder / "out", block=256))


@pytest.mark.parametrize("method", FAMILY)
def test_equal_settings_are_the_method_itself(tmp_path, method):
    models = random_models(2, torch.float32)
    rule = build(method)
    assert isinstance(rule, Selective)
    last = rule.spec.model_copy(update={"sparsify": "none", "rescale": False})
    each = Each([rule.spec, rule.spec], Selective(last, rule.shares, rule.seed))
    by_each = run(tmp_path / "each", models, each)
    settings = {"weights": [0.5, 0.7], "density": 0.4}
    by_method = merged(tmp_path / "method", models, method, **settings)
    for name, wanted in by_method.items():
        assert torch.equal(by_each[name], wanted), name


def test_densities_that_differ(tmp_path):
    models = random_models(2, torch.float32)
    rule = build("dare_linear", densities=(0.25, 1.0), rescale=False)
    assert isinstance(rule, Each)
    got = run(tmp_path / "a", models, rule)["w.weight"].double()
    base, first, second = (one["w.weight"].double() for one in models)
    left = (got - base - 0.7 * (second - base)) / (0.5 * (first - base))
    kept = (left - 1).abs() < 1e-2
    assert ((left.abs() < 1e-2) | kept).all()  # kept whole or dropped
    n = left.numel()
    assert abs(kept.double().mean() - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5
    none = run(tmp_path / "b", models, build("dare_linear", densities=(0.0, 1.0)))["w.weight"]
    torch.testing.assert_close(none.double(), base + 0.7 * (second - base), rtol=1e-6, atol=1e-6)


def test_draws_differ_between_models(tmp_path):
    models = random_models(1, torch.float32)
    models.append(models[1])
    rule = build("dare_linear", weights=(1.0, -1.0), densities=(0.5, 0.500001), rescale=False)
    got = run(tmp_path / "a", models, rule)["w.weight"]
    same = (got - models[0]["w.weight"]).abs() < 1e-6
    assert 0.4 < same.double().mean() < 0.6  # with equal draws it would be all


def test_factors_that_sum_to_one_here_and_not_there(tmp_path):
    """A plain sum takes the models in one form for all tensors."""
    models = random_models(2, torch.bfloat16)
    other = build("task_arithmetic", weights=(0.5, 0.9))
    rules = dict.fromkeys(models[0], other)
    rules["w.weight"] = build("task_arithmetic", weights=(0.25, 0.75))
    got = run(tmp_path / "a", models, ByTensor(rules))
    for name, factors in (("w.weight", (0.25, 0.75)), ("norm.weight", (0.5, 0.9))):
        base, first, second = (one[name].double() for one in models)
        wanted = base + factors[0] * (first - base) + factors[1] * (second - base)
        torch.testing.assert_close(got[name].double(), wanted, rtol=2**-8, atol=1e-6)


def test_what_is_refused():
    with pytest.raises(InputError, match="rescale belongs to dare and della; ties"):
        build("ties", rescale=True)
    linear = dialects()["linear"]
    with pytest.raises(InputError, match="sum to zero"):
        linear.build("linear", {"normalize": True}, [{"weight": 1}, {"weight": -1}], False, 0)
    row = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    with pytest.raises(InputError, match="nuslerp_row_wise"):
        dialects()["nuslerp"].build("nuslerp", row, [{"weight": 1}] * 2, False, 0)
