"""Sparse deltas: unions, inner products, the file; the laws they share are in `test_delta`."""

import json

import numpy as np
import pytest
import torch
from changes import agree, dense
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltaloom.core.delta import load
from deltaloom.core.deltas._reading import CONFIG, WEIGHTS
from deltaloom.core.deltas.sparse import Elements, Sparse
from deltaloom.core.errors import InputError

SHAPE = (5, 4)
SOME = st.dictionaries(st.integers(0, 19), st.floats(-9, 9, width=32), max_size=20)


def of(some):
    rows = sorted(some.items())
    indices = torch.tensor([i for i, _ in rows], dtype=torch.int64)
    return Elements(indices, torch.tensor([v for _, v in rows], dtype=torch.float32), SHAPE)


def plain(some):
    change = np.zeros(20, np.float32)
    for index, value in some.items():
        change[index] = value
    return change.reshape(SHAPE)


@settings(max_examples=80)
@given(SOME, SOME)
def test_sums_hold_the_union_and_dots_the_intersection(a, b):
    both = of(a).joined(of(b))
    assert both.indices.tolist() == sorted({*a} | {*b})
    np.testing.assert_array_equal(both.dense().numpy(), plain(a) + plain(b))
    wanted = float((plain(a).astype(float) * plain(b)).sum())
    assert of(a).dot(of(b)) == pytest.approx(wanted, rel=1e-12)
    assert torch.equal(both.dense(), of(b).joined(of(a)).dense())


NORM, HEAD = "model.norm.weight", "model.embed_tokens.weight"


def delta_over(base):
    return Sparse(
        base,
        {
            NORM: Elements(torch.tensor([2, 15]), torch.tensor([0.5, -1.0]), (16,)),
            HEAD: Elements(torch.tensor([0, 17, 367]), torch.tensor([1.0, 0.0, 2.0]), (23, 16)),
        },
    )


def test_the_file_takes_eight_bytes_an_element(llama, tmp_path):
    delta = delta_over(llama)
    delta.save(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert {(v.dtype, v.dim()) for k, v in stored.items() if k.endswith(".sparse_indices")} == {
        (torch.int32, 1)
    }
    assert sum(v.numel() * v.element_size() for v in stored.values()) == 5 * 8
    again = load(tmp_path, llama)
    assert isinstance(again, Sparse)
    for name, own in delta.elements.items():
        assert torch.equal(again.elements[name].indices, own.indices)
        assert torch.equal(again.elements[name].values, own.values)


def test_empty_supports_are_deltas_too(llama, tmp_path):
    nothing = Elements(torch.empty(0, dtype=torch.int64), torch.empty(0), (16,))
    delta = Sparse(llama, {NORM: nothing})
    delta.save(tmp_path)
    again = load(tmp_path, llama)
    assert again.norm() == 0.0
    agree(dense(again + delta_over(llama)), dense(delta_over(llama)), close=False)


MODULE = "base_model.model.model.norm.sparse_"


def rewritten(folder, change, shapes):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    if shapes is not None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "shapes": shapes}))


@pytest.mark.parametrize(
    ("change", "shapes", "said"),
    [
        (lambda t: t[f"{MODULE}indices"].copy_(torch.tensor([15, 2])), None, "are not rising"),
        (lambda t: t[f"{MODULE}indices"].copy_(torch.tensor([2, 2])), None, "are not rising"),
        (lambda t: t[f"{MODULE}indices"].copy_(torch.tensor([2, 16])), None, r"outside \[16\]"),
        (lambda t: t[f"{MODULE}indices"].copy_(torch.tensor([-1, 2])), None, "outside"),
        (lambda t: t.update({f"{MODULE}values": torch.ones(3)}), None, "not as many as its"),
        (lambda t: t.pop(f"{MODULE}values"), None, "is not half of a sparse change"),
        (lambda t: t.update(more=torch.ones(1)), None, "more is not half of a sparse change"),
        (lambda t: None, 3, "does not say the shapes"),
        (lambda t: None, {}, "is not half of a sparse change that adapter_config.json knows"),
        (
            lambda t: None,
            {"model.norm": [4, 4], "model.embed_tokens": [23, 16]},
            r"has shape \[4, 4\], the base .* \[16\]",
        ),
    ],
    ids=[
        "falling",
        "twice",
        "beyond",
        "negative",
        "counts",
        "lacking",
        "more",
        "shapes",
        "unknown",
        "other",
    ],
)
def test_broken_files_are_refused(llama, tmp_path, change, shapes, said):
    delta_over(llama).save(tmp_path)
    rewritten(tmp_path, change, shapes)
    with pytest.raises(InputError, match=said) as caught:
        load(tmp_path, llama)
    assert str(tmp_path) in str(caught.value)
