"""The kernel in two maps, against torch.func's full Jacobians in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_ntk import KINDS, Tokens, by_definition, of_points, perceptron, points

from deltaloom.engine.kernel_tiles import (
    Part,
    add_tile,
    signs_of,
    slab_gradients,
    slabs,
    tile,
    width_of,
)


def in_tiles(model, batches, outputs, kinds, entries, sizes, learned=None):
    """Kernels with each batch as a block; only the first `learned` rows to learn from."""
    sides = [len(next(iter(b.values())) if isinstance(b, dict) else b) for b in batches]
    ends = np.cumsum([0, *sides]).tolist()
    blocks = [range(a, b) for a, b in pairwise(ends)]
    with torch.no_grad():
        k = outputs(batches[0]).shape[1]
    n = learned or ends[-1]
    found = {kind: np.zeros((n, k, ends[-1], k)) for kind in kinds}
    for slab in slabs(sizes, entries):
        rows = [slab_gradients(model, b, outputs, slab).flatten(0, 1).numpy() for b in batches]
        assert all(r.shape[1] == width_of(slab) <= entries for r in rows)
        for i, down in enumerate(blocks):
            for j in range(i, len(blocks)):
                if down.start < n:
                    add_tile(found, down, blocks[j], tile(rows[i], rows[j], slab, signs_of(kinds)))
    return found


def sizes_of(model):
    return {name: p.numel() for name, p in model.named_parameters()}


@pytest.mark.parametrize("learned", [None, 4])
@pytest.mark.parametrize("entries", [10**6, 20, 1])
def test_any_module_equals_full_jacobians(entries, learned):
    model, batches = perceptron(), points(3, 2, 2)
    found = in_tiles(model, batches, model, KINDS, entries, sizes_of(model), learned)
    own = of_points(model, batches)
    for kind in KINDS:
        wanted = by_definition(own, own, kind)[:learned]
        np.testing.assert_allclose(found[kind], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sgd", "asymmetric"])
def test_language_model_equals_full_jacobians(kind, tmp_path):
    case = Tokens(tmp_path)
    names = [name for name in sizes_of(case.model) if "k_proj" not in name]
    sizes = {name: sizes_of(case.model)[name] for name in names}
    found = in_tiles(case.model, case.batches, case.outputs, [kind], 700, sizes)[kind]
    own = case.jacobian(names)
    wanted = by_definition(own, own, kind)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_slabs_hold_every_entry_once_and_in_order():
    sizes = {"a": 3, "b": 7, "c": 1, "d": 4}
    for entries in (1, 2, 4, 5, 15, 100):
        cut = slabs(sizes, entries)
        assert [width_of(slab) for slab in cut[:-1]] == [entries] * (len(cut) - 1)
        assert 0 < width_of(cut[-1]) <= entries
        seen = [(p.name, k) for slab in cut for p in slab for k in range(p.start, p.stop)]
        assert seen == [(name, k) for name, size in sizes.items() for k in range(size)]
    assert slabs(sizes, 4)[1] == [Part("b", 1, 5)]
