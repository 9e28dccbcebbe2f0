"""Adaptation to a few rows in closed form, and gradients of a loss after adaptation.

With outputs f (n,) of n rows, slopes J (n, D), kernel K = J J' and targets y, gradient flow on the
squares of the model that is linear at theta changes the parameters by

    change(t) = J' K^-1 (I - exp(-t K)) (y - f),

the closed form of Meta-RKHS-II (Zhou et al. 2021, "Meta-Learning with Neural Tangent Kernels",
arXiv 2102.03909, equation 5, here for the parameters). K need not be invertible. `time` is t in
units of n / trace K, so that it means the same whatever the outputs' scale: an average direction
keeps exp(-time) of its error.

Everything is a function of named parameters, so that it serves any module:
`lambda p: torch.func.functional_call(module, p, (x,)).squeeze()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]
Function = Callable[[Parameters], Tensor]
"""Gives a scalar: a row's output, or a loss."""


@dataclass(frozen=True)
class Tangent:
    """Outputs of rows and how they change with the parameters, to first order."""

    values: Tensor
    """(n,)"""
    slopes: Tensor
    """(n, D), the parameters end to end in their order."""


class Outer(NamedTuple):
    """A loss after adaptation, and its gradient by the parameters before it."""

    loss: float
    gradient: dict[str, Tensor]


def tangent(rows: Sequence[Function], parameters: Parameters) -> Tangent:
    """The tangent of `rows`, one backward pass each."""
    leaves = _leaves(parameters)
    values, slopes = [], []
    for row in rows:
        value = row(leaves)
        values.append(value.detach())
        slopes.append(_joined(_gradients(value, leaves), leaves))
    return Tangent(torch.stack(values), torch.stack(slopes))


def weights(kernel: Tensor, residuals: Tensor, time: float) -> Tensor:
    """K^-1 (I - exp(-t K)) r (n,), differentiable, for any positive semi-definite K.

    It is the last column of exp [[-t K, t r], [0, 0]]: no inverse is taken.
    """
    count = len(residuals)
    scale = time * count / kernel.trace().clamp_min(torch.finfo(kernel.dtype).tiny)
    above = torch.cat([-scale * kernel, scale * residuals[:, None]], 1)
    whole = torch.cat([above, above.new_zeros(1, count + 1)])
    return torch.linalg.matrix_exp(whole)[:count, count]


def change(at: Tangent, targets: Tensor, time: float) -> Tensor:
    """What gradient flow changes in the parameters (D,), in closed form."""
    found = weights(_kernel(at), _small(targets - at.values), time)
    return at.slopes.T @ found.to(at.slopes)


def moved(parameters: Parameters, by: Tensor) -> dict[str, Tensor]:
    """The parameters with `by` (D,) added."""
    parts = _parted(by, parameters)
    return {name: tensor + parts[name] for name, tensor in parameters.items()}


def closed_form(
    rows: Sequence[Function], parameters: Parameters, targets: Tensor, time: float
) -> dict[str, Tensor]:
    """Parameters adapted to `rows`: the linear model's after gradient flow for `time`."""
    return moved(parameters, change(tangent(rows, parameters), targets, time))


def after_closed_form(
    query: Callable[[Parameters, Tensor], Tensor],
    parameters: Parameters,
    at: Tangent,
    targets: Tensor,
    time: float,
    rows: Sequence[Function] = (),
) -> Outer:
    """Loss and gradient of `query(parameters, change)` after adaptation in closed form.

    `lambda p, by: loss(moved(p, by))` is the loss of the adapted network, one that takes `by`
    through `torch.func.jvp` that of the linear model.

    Args:
        query: Loss of other rows of the task.
        parameters: theta.
        at: The tangent of the task's rows at theta.
        targets: y (n,).
        time: As in the module's docstring.
        rows: The rows' outputs, for the whole gradient: two backward passes each. Without them
            the change is taken for a constant (first order).
    """
    leaves = _leaves(parameters)
    by = change(at, targets, time).requires_grad_()
    loss = query(leaves, by)
    *own, through = torch.autograd.grad(loss, [*leaves.values(), by], materialize_grads=True)
    total = _joined(own, leaves)
    if rows:
        total += _through_change(through, leaves, at, targets, time, rows)
    return Outer(float(loss.detach()), _parted(total, parameters))


def _through_change(
    by: Tensor,
    leaves: dict[str, Tensor],
    at: Tangent,
    targets: Tensor,
    time: float,
    rows: Sequence[Function],
) -> Tensor:
    """(d change / d theta)' by, row after row, so that one row's graph is held at a time."""
    kernel = _kernel(at).requires_grad_()
    residuals = _small(targets - at.values).requires_grad_()
    own = weights(kernel, residuals, time)
    met = _small(at.slopes @ by)  # (n,)
    to_kernel, to_residuals = torch.autograd.grad(own @ met, [kernel, residuals])
    # What each row's slope is multiplied with, (n, D).
    partners = torch.outer(own.detach().to(by), by)
    partners += (to_kernel + to_kernel.T).to(by) @ at.slopes
    total = -(at.slopes.T @ to_residuals.to(by))
    for row, partner in zip(rows, partners, strict=True):
        slope = _joined(_gradients(row(leaves), leaves, graph=True), leaves)
        total += _joined(_gradients(slope @ partner, leaves), leaves)
    return total


def descended(
    loss: Function, parameters: Parameters, lr: float, steps: int, *, graph: bool = False
) -> dict[str, Tensor]:
    """Parameters after `steps` of gradient descent; with `graph` a function of those before."""
    found = dict(parameters) if graph else _leaves(parameters)
    for _ in range(steps):
        slopes = _gradients(loss(found), found, graph=graph)
        found = {
            name: tensor - lr * slope
            for (name, tensor), slope in zip(found.items(), slopes, strict=True)
        }
        if not graph:
            found = _leaves(found)
    return found


def after_descent(
    support: Function,
    query: Function,
    parameters: Parameters,
    lr: float,
    steps: int,
    *,
    first_order: bool,
) -> Outer:
    """MAML's loss and gradient (Finn et al. 2017, arXiv 1703.03400): query after descent on
    support. The whole gradient holds the graph of all steps."""
    before = _leaves(parameters)
    after = descended(support, before, lr, steps, graph=not first_order)
    loss = query(after)
    slopes = _gradients(loss, after if first_order else before)
    return Outer(float(loss.detach()), dict(zip(parameters, slopes, strict=True)))


def towards_descent(loss: Function, parameters: Parameters, lr: float, steps: int) -> Outer:
    """Reptile's direction (Nichol et al. 2018, arXiv 1803.02999): theta - theta(steps), over lr."""
    after = descended(loss, parameters, lr, steps)
    with torch.no_grad():
        return Outer(
            float(loss(after).detach()),
            {name: (tensor - after[name]) / lr for name, tensor in parameters.items()},
        )


def steepness(loss: Function, parameters: Parameters, strength: float) -> Outer:
    """Meta-RKHS-I's energy L - strength |dL/dtheta|^2 (equation 4, theorem 2) and its gradient."""
    leaves = _leaves(parameters)
    value = loss(leaves)
    slope = _joined(_gradients(value, leaves, graph=True), leaves)
    energy = value - strength * (slope @ slope)
    return Outer(float(value.detach()), dict(zip(leaves, _gradients(energy, leaves), strict=True)))


def _leaves(parameters: Parameters) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}


def _gradients(value: Tensor, leaves: Parameters, *, graph: bool = False) -> Sequence[Tensor]:
    """By every leaf; zero where the value does not depend on it."""
    if not value.requires_grad:  # second derivatives of what is linear
        return [torch.zeros_like(leaf) for leaf in leaves.values()]
    return torch.autograd.grad(
        value, [*leaves.values()], create_graph=graph, materialize_grads=True
    )


def _joined(parts: Sequence[Tensor], like: Parameters) -> Tensor:
    """(D,), in one type."""
    kind = next(iter(like.values()))
    return torch.cat([part.flatten().to(kind) for part in parts])


def _parted(whole: Tensor, like: Parameters) -> dict[str, Tensor]:
    sizes = [tensor.numel() for tensor in like.values()]
    parts = zip(like.items(), whole.split(sizes), strict=True)
    return {name: part.view(tensor.shape).to(tensor) for (name, tensor), part in parts}


def _kernel(at: Tangent) -> Tensor:
    return _small(at.slopes @ at.slopes.T)


def _small(tensor: Tensor) -> Tensor:
    """On the CPU in float64, where n x n numbers cost nothing."""
    return tensor.detach().cpu().double()
