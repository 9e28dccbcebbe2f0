"""Projections against their definitions; compiled loops against numpy in float64."""

import numpy as np
import pytest
import torch

from deltaloom.core.errors import InputError
from deltaloom.engine.preconditioning import Adam, sign
from deltaloom.engine.projection import projection
from deltaloom.engine.taps import Rows

KINDS = ["sparse", "rademacher", "gaussian", "kronecker"]


def rows_of(matrix):
    return Rows(lambda: matrix)


def image(kind, matrix, dim=64, seed=3, name="w", precondition=None):
    out = torch.zeros(len(matrix), dim)
    projection(kind, dim, seed).add(name, rows_of(matrix), out, precondition)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_linear_map_of_seed_and_name(kind):
    rows = torch.randn(5, 20, 25, generator=torch.Generator().manual_seed(0))
    whole = image(kind, rows)
    assert torch.equal(image(kind, rows), whole)
    assert torch.allclose(image(kind, rows[2:3])[0], whole[2], atol=1e-5)
    mixed = image(kind, 2 * rows[:1] - rows[1:2])
    assert torch.allclose(mixed, 2 * whole[:1] - whole[1:2], atol=1e-4)
    assert not torch.allclose(image(kind, rows, seed=4), whole)
    assert not torch.allclose(image(kind, rows, name="u"), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_add_up(kind):
    one, two = torch.randn(3, 4, 5), torch.randn(3, 6)
    both = torch.zeros(3, 64)
    project = projection(kind, 64, 3)
    project.add("w", rows_of(one), both, None)
    project.add("u", rows_of(two), both, None)
    assert torch.allclose(both, image(kind, one) + image(kind, two, name="u"), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_survive_with_error_one_over_root_dim(kind):
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(40, 3000, generator=generator), dim=1)
    rows[1::2] = torch.nn.functional.normalize(rows[1::2] + rows[::2], dim=1)
    exact = rows @ rows.T
    apart = ~torch.eye(40, dtype=torch.bool)
    errors = []
    for seed in range(20):
        found = image(kind, rows.reshape(40, 50, 60), dim=256, seed=seed)
        errors.append((found @ found.T - exact)[apart])
    errors = torch.stack(errors)
    assert abs(errors.mean().item()) < 0.01  # unbiased
    rmse = errors.square().mean().sqrt().item()
    # two one-sided maps of width 16 lose more than one of width 256
    most = 3.0 if kind == "kronecker" else 1.5
    assert 0.5 / 256**0.5 < rmse < most / 256**0.5


@pytest.mark.parametrize("dim", [32, 1 << 16])
def test_sparse_puts_each_coordinate_into_one_signed_bucket(dim):
    matrix = image("sparse", torch.eye(300), dim=dim)  # row i is the image of coordinate i
    assert ((matrix != 0).sum(dim=1) == 1).all()
    assert set(matrix[matrix != 0].tolist()) == {1.0, -1.0}
    assert abs(matrix.sum().item()) < 4 * 300**0.5


@pytest.mark.parametrize("size", [7, 1024, 2500])
def test_compiled_sums_equal_the_matrix_in_float64(size):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, size, generator=generator) * 0.01
    m, v = torch.randn(size, generator=generator) * 0.01, torch.rand(size, generator=generator)
    v[::3] = 0  # parameters that the warm-up never moved
    matrix = image("sparse", torch.eye(size)).double()
    adam = Adam({"w": m}, {"w": v * 1e-4})
    moved = 0.9 * m.double() + 0.1 * rows.double()
    spread = 0.999 * 1e-4 * v.double() + 0.001 * rows.double() ** 2
    step = moved / (spread + 1e-8).sqrt()
    wanted = [(None, rows.double()), (adam, step), (sign, rows.sign().double())]
    for how, values in wanted:
        got = image("sparse", rows, precondition=how).double()
        goal = values @ matrix
        assert (got - goal).norm() / goal.norm() < 1e-6
    assert torch.allclose(adam("w", rows).double(), step, rtol=1e-4)


def test_kronecker_is_the_same_from_factors_and_from_the_product():
    left, right = torch.randn(3, 7, 10), torch.randn(3, 7, 12)
    whole = torch.einsum("btm,btn->bmn", left, right)
    out = torch.zeros(3, 64)
    projection("kronecker", 64, 3).add("w", Rows(lambda: whole, left, right), out, None)
    assert torch.allclose(out, image("kronecker", whole), atol=1e-3)


def test_kronecker_says_what_it_cannot_do():
    with pytest.raises(InputError, match="dimension = 50: a kronecker projection needs a square"):
        projection("kronecker", 50, 0)
    with pytest.raises(InputError, match="cannot precondition"):
        image("kronecker", torch.ones(1, 2, 2), precondition=sign)


def test_seeds_do_not_shift_each_other():
    a, b = (projection("sparse", 1 << 14, seed).codes("w", 1000) >> 1 for seed in (0, 1))
    for shift in range(-3, 4):
        assert (np.roll(a, shift) == b).mean() < 0.02
