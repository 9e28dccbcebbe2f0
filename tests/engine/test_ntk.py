"""Kernels against torch.func's full Jacobians in float64."""

import numpy as np
import pytest
import torch
from tiny import base_in
from torch import nn
from torch.func import functional_call, jacrev

from deltaloom.core.base import Base
from deltaloom.core.errors import InputError
from deltaloom.engine import ntk
from deltaloom.engine.ntk import along, gradients, gram, grams
from deltaloom.engine.taps import Taps

KINDS = ("sgd", "sign", "asymmetric", "flipped")


def perceptron(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)
    return nn.Sequential(*layers).to(dtype)


def points(*sizes, seed=1, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 5, generator=draw, dtype=torch.float64).to(dtype) for size in sizes]


def jacobian(model, f, inputs, names=None):
    """(n, k, D) by reverse mode over the whole function of all rows."""
    chosen = {n: p.detach() for n, p in model.named_parameters() if names is None or n in names}
    found = jacrev(lambda own: f(functional_call(model, own, (), inputs)))(chosen)
    parts = [found[name].detach().flatten(2) for name in chosen]
    return torch.cat(parts, 2)


def by_definition(left, right, kind):
    left = left.sign() if kind in ("sign", "asymmetric") else left
    right = right.sign() if kind in ("sign", "flipped") else right
    return torch.einsum("icp,jdp->icjd", left, right).numpy()


def of_points(model, batches):
    return jacobian(model, lambda y: y, {"input": torch.cat(batches)})


@pytest.mark.parametrize("memory", [2**30, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_any_module_equals_full_jacobians(kind, memory):
    model, left, right = perceptron(), points(3, 2), points(4, 1, 2, seed=2)
    found = gram(model, left, right, model, kind, memory=memory)
    wanted = by_definition(of_points(model, left), of_points(model, right), kind)
    assert found.shape == (5, 3, 7, 3)
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)
    turned = gram(model, right, left, model, kind, memory=memory)
    wanted = by_definition(of_points(model, right), of_points(model, left), kind)
    np.testing.assert_allclose(turned, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory", [2**30, 2500, 1])
def test_one_side_with_itself(memory):
    model, batches = perceptron(), points(3, 2, 2, 1)
    found = grams(model, batches, batches, model, KINDS, memory=memory)
    own = of_points(model, batches)
    for kind in KINDS:
        np.testing.assert_allclose(
            found[kind], by_definition(own, own, kind), rtol=1e-10, atol=1e-10
        )


class Tokens:
    """A tiny Llama in float64 with two functions of its last logits."""

    def __init__(self, folder, **config):
        self.model = Base(model=str(base_in(folder, **config)), device="cpu").load().double()
        draw = torch.Generator().manual_seed(3)
        ids = torch.randint(4, 20, (6, 7), generator=draw)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        ids[1, 5:] = 0
        self.batches = [
            {"input_ids": ids[part], "attention_mask": mask[part]}
            for part in (slice(0, 2), slice(2, 5), slice(5, 6))
        ]
        self.all = {"input_ids": ids, "attention_mask": mask, "use_cache": False}

    def values(self, found):
        logits = found.logits[:, -3]
        return torch.stack([logits[:, 5] - logits[:, 6], logits[:, 7].tanh()], 1)

    def outputs(self, batch):
        return self.values(self.model(**batch, use_cache=False))

    def jacobian(self, names=None):
        return jacobian(self.model, self.values, self.all, names)


@pytest.mark.parametrize("memory", [2**30, 200_000, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_language_model_equals_full_jacobians(tmp_path, tied, memory):
    case = Tokens(tmp_path, tie_word_embeddings=tied)
    own = case.jacobian()
    found = gram(case.model, case.batches, case.batches, case.outputs, memory=memory)
    np.testing.assert_allclose(found, by_definition(own, own, "sgd"), rtol=1e-9, atol=1e-9)
    oblong = gram(case.model, case.batches[:1], case.batches, case.outputs, memory=memory)
    np.testing.assert_allclose(oblong, found[:2], rtol=1e-9, atol=1e-9)


def test_named_parameters_only(tmp_path):
    case = Tokens(tmp_path)
    names = [name for name, _ in case.model.named_parameters() if "v_proj" in name]
    own = case.jacobian(names)
    found = gram(case.model, case.batches, case.batches, case.outputs, "sign", names=names)
    np.testing.assert_allclose(found, by_definition(own, own, "sign"), rtol=1e-9, atol=1e-9)


def test_what_must_be_held_is_small_where_factors_are(tmp_path, monkeypatch):
    case = Tokens(tmp_path, hidden_size=64, intermediate_size=96)
    sizes = {}
    closed = ntk._Block.close

    def close(block):
        sizes.setdefault(block.compact, []).append(block.size)
        closed(block)

    monkeypatch.setattr(ntk._Block, "close", close)
    for memory in (2**30, 1):
        gram(case.model, case.batches, case.batches, case.outputs, memory=memory)
    assert len(sizes[False]) == 1
    assert len(sizes[True]) == 3  # one block per batch
    assert sum(sizes[True]) < sizes[False][0] / 2


def test_rows_of_unequal_length_share_a_block_of_factors(tmp_path):
    case = Tokens(tmp_path, hidden_size=64, intermediate_size=96)
    ids = torch.randint(4, 20, (2, 60), generator=torch.Generator().manual_seed(9))
    batches = [case.batches[0], {"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    wanted = gram(case.model, batches, batches, case.outputs)
    held = gram(case.model, batches, batches, case.outputs, memory=4_000_000)
    turned = gram(case.model, batches[::-1], batches, case.outputs, memory=4_000_000)
    np.testing.assert_allclose(held, wanted, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(turned[[2, 3, 0, 1]], wanted, rtol=1e-9, atol=1e-9)


def test_backward_passes_are_few(monkeypatch):
    model, batches = perceptron(), points(2, 2, 2)
    backward, calls = Taps.backward, []

    def counted(*args, **options):
        calls.append(1)
        backward(*args, **options)

    monkeypatch.setattr(Taps, "backward", counted)
    gram(model, batches, batches, model)
    assert len(calls) == 3 * 3  # batches times outputs, and nothing again for the other side


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_near(dtype):
    exact, batches = perceptron(), points(4)
    model = perceptron(dtype)
    found = gram(model, points(4, dtype=dtype), points(3, seed=2, dtype=dtype), model)
    wanted = gram(exact, batches, points(3, seed=2), exact)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < (1e-6 if dtype == torch.float32 else 0.03)


def test_along_is_the_derivative(tmp_path):
    case = Tokens(tmp_path)
    names = [name for name, _ in case.model.named_parameters() if "proj" in name]
    draw = torch.Generator().manual_seed(5)
    own = dict(case.model.named_parameters())
    direction = {n: torch.randn(own[n].shape, generator=draw).double() for n in names}
    flat = torch.cat([direction[n].flatten() for n in own if n in direction])
    found = along(case.model, case.batches, case.outputs, direction)
    np.testing.assert_allclose(found, (case.jacobian(names) @ flat).numpy(), rtol=1e-9)


def test_gradients_are_the_jacobian():
    model, (batch,) = perceptron(), points(4)
    found = gradients(model, batch, model, [name for name, _ in model.named_parameters()])
    parts = torch.cat([found[name] for name, _ in model.named_parameters()], 2)
    torch.testing.assert_close(parts, of_points(model, [batch]))


def test_batches_in_any_container():
    model, batches = perceptron(), points(3, 2)
    wanted = gram(model, batches, batches, model)
    for packed, f in (
        ([{"x": b} for b in batches], lambda batch: model(batch["x"])),
        ([("name", b) for b in batches], lambda batch: model(batch[1])),
    ):
        np.testing.assert_array_equal(gram(model, packed, packed, f), wanted)


def test_frozen_again_and_unfrozen_again():
    model = perceptron()
    model[0].bias.requires_grad_(False)
    gram(model, points(2), points(1), model)
    assert [p.requires_grad for p in model.parameters()] == [True, False, *[True] * 4]
    assert all(p.grad is None for p in model.parameters())


def test_bad_input():
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double().eval()
    with pytest.raises(InputError, match="mixes the rows"):
        gram(model, points(2), points(2), model)
    with pytest.raises(ValueError, match="'adam'"):
        gram(perceptron(), points(2), points(2), perceptron(), "adam")  # pyright: ignore[reportArgumentType]
