"""One batched backward pass against one backward pass a row; projections against definitions."""

import numpy as np
import pytest
import tiny
import torch

from deltaloom.core.base import Base
from deltaloom.core.encoding import encode
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.engine import gradients
from deltaloom.engine.gradients import parameter_names, per_example
from deltaloom.engine.projection import Rademacher, Sparse
from deltaloom.tune.lora import Lora


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    home = tmp_path_factory.mktemp("gradients")
    base = Base(model=str(tiny.base_in(home / "base")))
    rows = encode(Examples.read(tiny.rows_in(home / "rows.jsonl")), base.tokenizer(), 64)
    model = Lora(r=3).attach(base, seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start: half of the gradients would vanish
            parameter.data.normal_(std=0.3)
    return model, rows


def one_by_one(model, rows):
    """The definition: batch of one, no padding, autograd's own parameter gradients."""
    model.eval()
    names = parameter_names(model)
    found = []
    for row in rows:
        model.zero_grad(set_to_none=True)
        ids = torch.tensor([row.input_ids])
        logits = model(input_ids=ids).logits[0, :-1].double()
        mask = torch.tensor(row.response_mask[1:], dtype=torch.bool)
        loss = torch.nn.functional.cross_entropy(logits[mask], ids[0, 1:][mask])
        loss.backward()
        found.append(torch.cat([model.get_parameter(n).grad.flatten() for n in names]))
    model.zero_grad(set_to_none=True)
    return torch.stack(found)


@pytest.mark.parametrize("tokens", [20, 64, 4096])
def test_batched_equals_one_by_one(setting, tokens, monkeypatch):
    monkeypatch.setattr(gradients, "TOKENS", tokens)
    model, rows = setting
    wanted = one_by_one(model, rows)
    got = torch.zeros_like(wanted)
    sizes = []
    for numbers, block in per_example(model, rows, pad_id=0):
        got[numbers] = block
        sizes.append(len(numbers))
    assert sum(sizes) == len(rows)
    if tokens > 20:
        assert max(sizes) > 1
    assert (got - wanted).norm() / wanted.norm() < 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_other_trainables_are_refused_by_name(setting, tmp_path):
    base = Base(model=str(tiny.base_in(tmp_path / "base")))
    model = base.load()
    with pytest.raises(InputError, match="embed_tokens"):
        parameter_names(model)


@pytest.mark.parametrize("kind", [Sparse, Rademacher])
def test_projection_is_a_fixed_linear_map(kind):
    project = kind(500, 64, seed=3)
    rows = torch.randn(5, 500, generator=torch.Generator().manual_seed(0))
    whole = project(rows)
    assert torch.allclose(project(rows[2:3])[0], whole[2], atol=1e-5)
    assert torch.equal(kind(500, 64, seed=3)(rows), whole)
    assert not torch.allclose(kind(500, 64, seed=4)(rows), whole)
    assert torch.allclose(project(2 * rows[:1] - rows[1:2]), 2 * whole[:1] - whole[1:2], atol=1e-4)


def test_sparse_projection_has_one_signed_entry_a_column():
    matrix = Sparse(300, 32, seed=0)(torch.eye(300))  # row i is the image of coordinate i
    assert ((matrix != 0).sum(dim=1) == 1).all()
    assert set(matrix[matrix != 0].tolist()) == {1.0, -1.0}
    assert abs(matrix.sum().item()) < 4 * 300**0.5


@pytest.mark.parametrize("kind", [Sparse, Rademacher])
def test_inner_products_survive_with_error_one_over_root_dim(kind):
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(40, 3000, generator=generator), dim=1)
    rows[1::2] = torch.nn.functional.normalize(rows[1::2] + rows[::2], dim=1)
    exact = rows @ rows.T
    errors = []
    for seed in range(20):
        image = kind(3000, 256, seed)(rows)
        errors.append((image @ image.T - exact)[~torch.eye(40, dtype=torch.bool)])
    errors = torch.stack(errors)
    assert abs(errors.mean().item()) < 0.01  # unbiased
    rmse = errors.square().mean().sqrt().item()
    assert 0.5 / 256**0.5 < rmse < 1.5 / 256**0.5


def test_seeds_do_not_shift_each_other():
    a, b = (np.asarray(Sparse(1000, 1 << 14, seed)._bucket) for seed in (0, 1))
    for shift in range(-3, 4):
        assert (np.roll(a, shift) == b).mean() < 0.02
