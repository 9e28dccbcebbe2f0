"""Closed forms against training to convergence and against the systems as they are written."""

import numpy as np
import pytest

from deltaloom.engine.kernel_regression import regress, regress_asymmetric, regress_one_sided


@pytest.fixture
def draw():
    return np.random.default_rng(0)


def problem(draw, n=12, m=5, width=30):
    x, z = draw.normal(size=(n, width)), draw.normal(size=(m, width))
    return x, z, draw.normal(size=n)


def test_is_where_gradient_descent_on_a_linear_model_ends(draw):
    x, z, y = problem(draw)
    w0 = draw.normal(size=x.shape[1])
    w = w0.copy()
    for _ in range(4000):
        w -= 0.02 * x.T @ (x @ w - y)
    assert np.abs(x @ w - y).max() < 1e-9  # converged
    found = regress(x @ x.T, x @ z.T, y, start=(x @ w0, z @ w0))
    np.testing.assert_allclose(found, z @ w, rtol=1e-7)


def test_ridge_is_the_primal_solution(draw):
    x, z, y = problem(draw, n=40, width=6)
    ridge = 0.03
    penalty = ridge * np.linalg.norm(x @ x.T, 2)
    w = np.linalg.solve(x.T @ x + penalty * np.eye(6), x.T @ y)
    np.testing.assert_allclose(regress(x @ x.T, x @ z.T, y, ridge=ridge), z @ w, rtol=1e-9)


def test_least_norm_where_rows_repeat(draw):
    x, z, y = problem(draw, n=6)
    x, y = np.concatenate([x, x]), np.concatenate([y, y])
    w = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(regress(x @ x.T, x @ z.T, y), z @ w, rtol=1e-9)


def test_start_is_kept_where_the_kernel_says_nothing(draw):
    x, z, y = problem(draw)
    before, after = draw.normal(size=12), draw.normal(size=5)
    found = regress(x @ x.T, np.zeros((12, 5)), y, start=(before, after))
    np.testing.assert_array_equal(found, after)
    given = regress(x @ x.T, x @ z.T, before, ridge=0.1, start=(before, after))
    np.testing.assert_allclose(given, after)  # nothing left to learn


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_asymmetric_is_the_papers_system_for_labels(draw, share):
    x, z, _ = problem(draw)
    y = np.where(draw.random(12) < 0.5, -1.0, 1.0)
    kernel, across, flipped = np.sign(x) @ x.T, np.sign(x) @ z.T, x @ np.sign(z).T
    d = 0.05 * np.linalg.norm(kernel, 2)  # 1 / gamma
    h = y[:, None] * kernel * y
    system = np.block([[d * np.eye(12), h], [h.T, d * np.eye(12)]])
    alpha, beta = np.split(np.linalg.solve(system, np.ones(24)), 2)
    wanted = share * across.T @ (alpha * y) + (1 - share) * flipped.T @ (beta * y)
    found = regress_asymmetric(kernel, across, y, ridge=0.05, share=share, flipped=flipped)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_asymmetric_without_ridge_interpolates(draw):
    x, _, y = problem(draw)
    kernel = np.sign(x) @ x.T
    across = np.sign(x) @ draw.normal(size=(30, 5))
    np.testing.assert_allclose(regress_asymmetric(kernel, kernel, y), y, rtol=1e-9)
    np.testing.assert_allclose(
        regress_asymmetric(kernel, across, y), regress_one_sided(kernel, across, y), rtol=1e-9
    )


@pytest.mark.parametrize("ridge", [0.0, 0.02])
def test_one_sided_is_the_penalised_least_squares(draw, ridge):
    x, z, y = problem(draw)
    kernel, across = np.sign(x) @ x.T, np.sign(x) @ z.T
    start = draw.normal(size=12), draw.normal(size=5)
    d = ridge * np.linalg.norm(kernel, 2)
    rows = np.concatenate([kernel.T, d * np.eye(12)])
    a = np.linalg.lstsq(rows, np.concatenate([y - start[0], np.zeros(12)]), rcond=None)[0]
    found = regress_one_sided(kernel, across, y, ridge=ridge, start=start)
    np.testing.assert_allclose(found, start[1] + across.T @ a, rtol=1e-8)


def test_one_sided_is_where_sign_descent_directions_lead(draw):
    x, z, y = problem(draw, n=5, m=3, width=60)
    kernel, a = np.sign(x) @ x.T, np.zeros(5)
    for _ in range(5000):  # steps along each row's signed gradient
        a -= 1e-4 * kernel @ (kernel.T @ a - y)
    w = np.sign(x).T @ a
    assert np.abs(x @ w - y).max() < 1e-9  # converged
    found = regress_one_sided(kernel, np.sign(x) @ z.T, y)
    np.testing.assert_allclose(found, z @ w, rtol=1e-7)


def test_asymmetric_of_a_symmetric_kernel_is_ridge(draw):
    x, z, y = problem(draw, n=8, width=4)  # of rank 4, so that the null space counts too
    kernel, across, start = x @ x.T, x @ z.T, (draw.normal(size=8), draw.normal(size=5))
    wanted = regress(kernel, across, y, ridge=0.2, start=start)
    for share in (0.0, 1.0):
        found = regress_asymmetric(
            kernel, across, y, ridge=0.2, start=start, share=share, flipped=across
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-8)


def test_a_kernel_of_zeros_predicts_nothing():
    zero = np.zeros((3, 3))
    assert not regress(zero, zero, np.ones(3), ridge=0.1).any()
    assert not regress_asymmetric(zero, zero, np.ones(3), ridge=0.1).any()


def test_bad_shapes_and_ridge():
    with pytest.raises(ValueError, match="do not fit"):
        regress(np.eye(3), np.eye(2), np.ones(3))
    with pytest.raises(ValueError, match="negative"):
        regress(np.eye(3), np.eye(3), np.ones(3), ridge=-1)
