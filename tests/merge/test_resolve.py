"""Settings of one tensor, beside the numbers that mergekit 0.1.5 resolves for the same YAML."""

import pytest
import yaml

from deltaloom.merge._checked import check
from deltaloom.merge._config import parse_config

TIES = """
models:
  - model: a
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: b
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: c
    parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
"""
SLERP = """
slices:
  - sources: [{model: a, layer_range: [0, 40]}, {model: b, layer_range: [0, 40]}]
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
"""


def resolved(text, name, t):
    one = check(parse_config(yaml.safe_load(text), "c"), "c")
    part = one.parts[0]
    shared, each = one.values(part, (name,) * len(part.sources), name, t)
    return shared, dict(each)


@pytest.mark.parametrize(
    ("name", "t", "density", "weights"),
    [
        ("model.embed_tokens.weight", 0, 1.0, (1, 0, 0)),
        ("model.layers.0.mlp.up_proj.weight", 0, 1.0, (1, 0, 0.5)),
        ("model.layers.13.self_attn.q_proj.weight", 13 / 39, 0.8, (1, 0.3, 0)),
        ("model.layers.26.mlp.up_proj.weight", 26 / 39, 0.5, (1, 0.7, 0.5)),
        ("model.layers.39.input_layernorm.weight", 1.0, 0.1, (1, 1, 0)),
    ],
)
def test_gradients_and_filters_per_model(name, t, density, weights):
    shared, each = resolved(TIES, name, t)
    assert shared == {"int8_mask": True, "normalize": True, "rescale": False, "lambda": 1.0}
    assert [each[m]["weight"] for m in "abc"] == pytest.approx(weights)
    assert [each[m]["density"] for m in "abc"] == pytest.approx((density, 0.5, 0.33))


@pytest.mark.parametrize(
    ("name", "t", "value"),
    [
        ("model.layers.13.self_attn.q_proj.weight", 13 / 39, 0.43333333333333335),
        ("model.layers.26.mlp.up_proj.weight", 26 / 39, 0.43333333333333335),
        ("model.layers.39.mlp.up_proj.weight", 1.0, 0.0),
        ("model.layers.5.input_layernorm.weight", 5 / 39, 0.5),
        ("lm_head.weight", 0, 0.5),
    ],
)
def test_one_setting_for_all_models(name, t, value):
    assert resolved(SLERP, name, t)[0] == {"t": pytest.approx(value)}


NEAREST = """
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: 1}]}}
      - {model: b, layer_range: [0, 2]}
      - {model: base, layer_range: [0, 2]}
    parameters: {weight: {filter: "*", value: "2e0"}, lambda: 3}
merge_method: task_arithmetic
base_model: base
parameters: {weight: 4, lambda: 5, normalize: [false, true]}
"""


def test_the_nearest_scope_with_a_match_wins():
    shared, each = resolved(NEAREST, "model.layers.0.mlp.w", 0.6)
    assert shared["lambda"] == 3.0
    assert shared["normalize"] is False  # of what is no number, the one at int(t (n - 1))
    assert resolved(NEAREST, "x", 1.0)[0]["normalize"] is True
    assert (each["a"]["weight"], each["b"]["weight"]) == (1.0, 2.0)
    assert resolved(NEAREST, "model.layers.0.attn.w", 0)[1]["a"]["weight"] == 2.0  # falls through
    assert "base" not in each


def test_a_text_that_is_a_number():
    text = "{models: [{model: a}], merge_method: karcher, parameters: {tol: 1e-7, max_iter: '3'}}"
    assert resolved(text, "x", 0)[0] == {"tol": 1e-7, "max_iter": 3}


def test_defaults():
    text = "{models: [{model: a, parameters: {weight: 1}}], merge_method: %s, base_model: b}"
    assert resolved(text % "della", "x", 0) == (
        {"int8_mask": False, "normalize": True, "rescale": True, "lambda": 1.0},
        {"a": {"weight": 1.0, "density": 1.0, "epsilon": 0.15}},
    )
    assert resolved(text % "breadcrumbs", "x", 0)[1]["a"]["gamma"] == 0.01
    assert resolved(text % "dare_ties", "x", 0)[0]["normalize"] is False
