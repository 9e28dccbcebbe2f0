"""Closed forms against the differential equation, gradients against autograd and differences."""

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import functional_call, jvp

from deltaloom.engine import adaptation
from deltaloom.engine.adaptation import moved

TIME = 3.0


@pytest.fixture
def task():
    """A small network in float64 with rows to adapt to and rows to be judged by."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    others, goals = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)

    def outputs(parameters, inputs):
        return functional_call(module, dict(parameters), (inputs,)).squeeze(-1)

    rows = [lambda p, one=one: outputs(p, one) for one in x]
    return Task(parameters, outputs, x, y, others, goals, rows)


class Task:
    def __init__(self, parameters, outputs, x, y, others, goals, rows):
        self.parameters, self.outputs, self.rows = parameters, outputs, rows
        self.x, self.y, self.others, self.goals = x, y, others, goals

    def support(self, parameters):
        return ((self.outputs(parameters, self.x) - self.y) ** 2).mean() / 2

    def query(self, parameters):
        return ((self.outputs(parameters, self.others) - self.goals) ** 2).mean() / 2

    def linear_query(self, parameters, by):
        parts = moved({k: torch.zeros_like(v) for k, v in parameters.items()}, by)
        call = (lambda p: self.outputs(p, self.others), (dict(parameters),), (parts,))
        return ((sum(jvp(*call)) - self.goals) ** 2).mean() / 2

    def slopes(self, x):
        """(n, D), by torch's own Jacobian."""
        names = [*self.parameters]
        found = jacobian(
            lambda *parts: self.outputs(dict(zip(names, parts, strict=True)), x),
            tuple(self.parameters.values()),
        )
        return torch.cat([part.flatten(1) for part in found], 1)

    def flat(self, found):
        return torch.cat([found[name].flatten() for name in self.parameters])


def differences(function, parameters, width=1e-5):
    """The gradient by central differences, entry by entry."""
    found = {}
    for name, tensor in parameters.items():
        slope = torch.zeros_like(tensor)
        for i in range(tensor.numel()):
            step = torch.zeros(tensor.numel(), dtype=tensor.dtype)
            step[i] = width
            high, low = (
                float(
                    function({**parameters, name: tensor + sign * step.view(tensor.shape)}).detach()
                )
                for sign in (1, -1)
            )
            slope.view(-1)[i] = (high - low) / (2 * width)
        found[name] = slope
    return found


def test_the_closed_form_ends_where_gradient_flow_on_the_linear_model_does(task):
    slopes = task.slopes(task.x)
    kernel = slopes @ slopes.T
    time = TIME * len(task.y) / float(kernel.trace())
    steps = 400
    start = by = torch.zeros(slopes.shape[1], dtype=torch.float64)
    first = task.outputs(task.parameters, task.x)

    def pull(by):
        return slopes.T @ (task.y - first - slopes @ by)

    for _ in range(steps):  # Runge and Kutta's rule of fourth order
        h = time / steps
        a = pull(by)
        b = pull(by + h / 2 * a)
        c = pull(by + h / 2 * b)
        d = pull(by + h * c)
        by = by + h / 6 * (a + 2 * b + 2 * c + d)
    found = adaptation.closed_form(task.rows, task.parameters, task.y, TIME)
    torch.testing.assert_close(task.flat(found) - task.flat(task.parameters), by, atol=1e-9, rtol=0)
    assert not torch.equal(by, start)


def test_weights_are_those_of_the_eigenvectors_and_need_no_inverse():
    torch.manual_seed(1)
    slopes = torch.randn(6, 3, dtype=torch.float64)  # a kernel of rank three
    kernel, residuals = slopes @ slopes.T, torch.randn(6, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(kernel)
    for time in (0.1, 10.0, 1e4):
        t = time * 6 / kernel.trace()
        rates = torch.where(values > 1e-9, -torch.expm1(-t * values) / values, t)
        wanted = vectors @ (rates * (vectors.T @ residuals))
        found = adaptation.weights(kernel, residuals, time)
        torch.testing.assert_close(slopes.T @ found, slopes.T @ wanted, atol=1e-8, rtol=1e-8)


def test_after_long_the_linear_model_answers_as_asked(task):
    at = adaptation.tangent(task.rows, task.parameters)
    by = adaptation.change(at, task.y, 1e6)
    torch.testing.assert_close(at.values + at.slopes @ by, task.y, atol=1e-6, rtol=0)


@pytest.mark.parametrize("linear", [True, False], ids=["linear model", "network"])
def test_the_whole_gradient_after_the_closed_form_is_that_of_differences(task, linear):
    def query(parameters, by):
        if linear:
            return task.linear_query(parameters, by)
        return task.query(moved(parameters, by))

    def loss(parameters):
        at = adaptation.tangent(task.rows, parameters)
        return query(parameters, adaptation.change(at, task.y, TIME))

    at = adaptation.tangent(task.rows, task.parameters)
    found = adaptation.after_closed_form(query, task.parameters, at, task.y, TIME, rows=task.rows)
    assert found.loss == pytest.approx(float(loss(task.parameters).detach()), abs=1e-12)
    torch.testing.assert_close(
        found.gradient, differences(loss, task.parameters), atol=1e-7, rtol=1e-6
    )


def test_the_linear_models_loss_is_that_of_the_papers_formula(task):
    slopes = [task.slopes(task.x), task.slopes(task.others)]
    kernel, across = slopes[0] @ slopes[0].T, slopes[1] @ slopes[0].T
    t = TIME * len(task.y) / kernel.trace()
    decayed = torch.matrix_exp(-t * kernel) - torch.eye(len(task.y), dtype=torch.float64)
    off = task.outputs(task.parameters, task.x) - task.y
    predicted = task.outputs(task.parameters, task.others) + across @ torch.linalg.solve(
        kernel, decayed @ off
    )
    at = adaptation.tangent(task.rows, task.parameters)
    found = adaptation.after_closed_form(task.linear_query, task.parameters, at, task.y, TIME)
    wanted = ((predicted - task.goals) ** 2).mean() / 2
    assert found.loss == pytest.approx(float(wanted), abs=1e-10)


def test_first_order_takes_the_change_for_a_constant(task):
    at = adaptation.tangent(task.rows, task.parameters)
    by = adaptation.change(at, task.y, TIME)

    def query(parameters, by):
        return task.query(moved(parameters, by))

    found = adaptation.after_closed_form(query, task.parameters, at, task.y, TIME)
    wanted = differences(lambda p: query(p, by), task.parameters)
    torch.testing.assert_close(found.gradient, wanted, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_mamls_gradient_is_that_of_differences(task, steps):
    def loss(parameters):
        return task.query(adaptation.descended(task.support, parameters, 0.3, steps))

    found = adaptation.after_descent(
        task.support, task.query, task.parameters, 0.3, steps, first_order=False
    )
    torch.testing.assert_close(
        found.gradient, differences(loss, task.parameters), atol=1e-8, rtol=1e-6
    )
    first = adaptation.after_descent(
        task.support, task.query, task.parameters, 0.3, steps, first_order=True
    )
    after = adaptation.descended(task.support, task.parameters, 0.3, steps)
    torch.testing.assert_close(first.gradient, differences(task.query, after), atol=1e-8, rtol=1e-6)
    assert first.loss == pytest.approx(found.loss, abs=1e-12)


def test_one_step_of_reptile_is_joint_training(task):
    found = adaptation.towards_descent(task.support, task.parameters, 0.3, 1)
    torch.testing.assert_close(
        found.gradient, differences(task.support, task.parameters), atol=1e-8, rtol=1e-6
    )


def test_the_energys_gradient_is_that_of_differences(task):
    def energy(parameters):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
        value = task.support(leaves)
        slopes = torch.autograd.grad(value, [*leaves.values()])
        return value - 0.2 * sum((slope**2).sum() for slope in slopes)

    found = adaptation.steepness(task.support, task.parameters, 0.2)
    torch.testing.assert_close(
        found.gradient, differences(energy, task.parameters), atol=1e-7, rtol=1e-6
    )
