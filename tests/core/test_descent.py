"""Directions, steps and rounding against closed forms and torch's own optimizers."""

import pytest
import torch

from deltaloom.core.deltas.descent import Descent, Rule, Scalars, replay, round_at_random
from deltaloom.core.deltas.directions import Directions

KINDS = [("lowrank", 1), ("lowrank", 3), ("rademacher", 1), ("gaussian", 1)]


def rule(**changes):
    settings = {
        "seed": 0,
        "direction": "lowrank",
        "rank": 1,
        "eps": 1e-3,
        "update": "sgd",
        "momentum": 0.9,
        "decay": 0.99,
    }
    return Rule(**{**settings, **changes})


def drawn(kind, rank, count, like):
    directions = Directions(kind, rank, 7)
    return [directions.of(step, 0, "w", like).dense() for step in range(count)]


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_directions_have_unit_covariance(kind, rank):
    z = torch.stack(drawn(kind, rank, 6000, torch.zeros(2, 3))).flatten(1).double()
    products = z[:, :, None] * z[:, None, :]
    mean, error = products.mean(0), products.std(0) / len(z) ** 0.5
    assert ((mean - torch.eye(6)).abs() <= 5 * error + 1e-12).all()
    assert (z.mean(0).abs() <= 5 * z.std(0) / len(z) ** 0.5).all()


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_the_estimate_of_a_quadratic_has_the_gradient_as_its_mean(kind, rank):
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    a, b = root @ root.T, torch.randn(6, generator=generator, dtype=torch.float64)
    p, eps = torch.randn(6, generator=generator, dtype=torch.float64), 0.1

    def loss(x):
        return 0.5 * x @ a @ x + b @ x

    estimates = []
    for z in drawn(kind, rank, 6000, torch.zeros(2, 3, dtype=torch.float64)):
        z = z.flatten()
        g = (loss(p + eps * z) - loss(p - eps * z)) / (2 * eps)
        # the third derivative is zero, so there is no bias in eps
        torch.testing.assert_close(g, z @ (a @ p + b), rtol=1e-9, atol=1e-9)
        estimates.append(g * z)
    found = torch.stack(estimates)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - (a @ p + b)).abs() <= 4 * error).all()
    assert (error < 0.2 * (a @ p + b).norm()).all()


def test_a_direction_is_decided_by_its_place():
    directions = Directions("lowrank", 2, 3)
    like = torch.zeros(4, 5)
    first = directions.of(1, 2, "a", like).dense()
    assert torch.equal(first, directions.of(1, 2, "a", like).dense())
    for other in [(2, 2, "a"), (1, 1, "a"), (1, 2, "b")]:
        assert not torch.equal(first, directions.of(*other, like).dense())
    assert not torch.equal(first, Directions("lowrank", 2, 4).of(1, 2, "a", like).dense())


def optimizer(update, parameter, lr):
    if update == "adam":
        return torch.optim.Adam([parameter], lr, betas=(0.9, 0.99))
    return torch.optim.SGD([parameter], lr, momentum=0.9 if update == "momentum" else 0.0)


@pytest.mark.parametrize("update", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize(("kind", "rank"), KINDS)
@pytest.mark.parametrize("shape", [(4, 5), (7,), (2, 3, 4)])
def test_the_forms_are_torchs_optimizers(update, kind, rank, shape):
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    steps = [
        Scalars(0.1 / (1 + t), tuple(torch.randn(2, generator=generator).tolist()))
        for t in range(6)
    ]
    own = rule(direction=kind, rank=rank, update=update)
    ours = start.clone()
    replay(own, "w", ours, steps)

    theirs = torch.nn.Parameter(start.clone())
    reference = optimizer(update, theirs, 0.1)
    for t, found in enumerate(steps):
        reference.param_groups[0]["lr"] = found.lr
        pairs = enumerate(found.values)
        terms = [g * own.directions.of(t, k, "w", start).dense() for k, g in pairs]
        theirs.grad = sum(terms) / len(terms)
        reference.step()
    # in-place moves of the Gaussian leave rounding behind
    torch.testing.assert_close(ours, theirs.data, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-3, 3e-6])
def test_rounding_at_random_gives_a_neighbour_and_keeps_the_mean(dtype, size):
    values = torch.randn(64, generator=torch.Generator().manual_seed(3)) * size
    found = torch.stack([round_at_random(values, dtype, seed).double() for seed in range(3000)])
    nearest = values.to(dtype)
    up = torch.nextafter(nearest, torch.tensor(torch.inf, dtype=dtype)).double()
    down = torch.nextafter(nearest, torch.tensor(-torch.inf, dtype=dtype)).double()
    nearest = nearest.double()
    exact = values.double()
    low, high = (
        torch.where(nearest > exact, down, nearest),
        torch.where(nearest < exact, up, nearest),
    )
    assert ((found == low) | (found == high)).all()
    error = found.std(0) / len(found) ** 0.5 + (high - low) / len(found)
    assert ((found.mean(0) - exact).abs() <= 5 * error).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_random_leaves_what_the_type_has(dtype):
    values = (torch.randn(100, generator=torch.Generator().manual_seed(4)) * 1e-4).to(dtype)
    assert torch.equal(round_at_random(values.float(), dtype, 5), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lowrank", "rademacher"])
@pytest.mark.parametrize("update", ["sgd", "momentum"])
def test_small_steps_on_16_bits_are_kept(dtype, kind, update):
    own = rule(direction=kind, update=update, momentum=0.0)
    weights = (torch.randn(64, 64, generator=torch.Generator().manual_seed(5)) * 0.02).to(dtype)
    wide, tensor = weights.float(), weights.clone()
    steps = [Scalars(1e-6, (1.0,))] * 200
    replay(own, "w", wide, steps)
    replay(own, "w", tensor, steps)
    intended, change = (
        (wide - weights.float()).double(),
        (tensor.float() - weights.float()).double(),
    )
    kept = float((change * intended).sum() / intended.square().sum())
    drift = float((change - intended).square().mean().sqrt())
    spread = drift / float(intended.square().sum().sqrt())  # standard error of `kept`
    assert abs(kept - 1) < 5 * spread
    nearest = weights.clone()
    for step in range(200):
        z = own.directions.of(step, 0, "w", weights).dense().float()
        nearest.copy_(nearest.float() - 1e-6 * z)
    lost = ((nearest.float() - weights.float()).double() * intended).sum()
    assert float(lost / intended.square().sum()) < 0.5


def test_steps_of_one_tensor_need_no_other():
    own = rule(update="adam")
    steps = [Scalars(0.1, (0.5,)), Scalars(0.1, (-0.25,))]
    alone = torch.ones(3, 4)
    replay(own, "b", alone, steps)
    descent, together = Descent(own), {"a": torch.ones(5), "b": torch.ones(3, 4)}
    for number, found in enumerate(steps):
        for name, tensor in together.items():
            z = own.directions.of(number, 0, name, tensor)
            descent.step(number, name, tensor, found, [z])
    assert torch.equal(together["b"], alone)
