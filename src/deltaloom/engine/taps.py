"""Every row's gradient from one backward pass of a batch: taps on the modules that own parameters.

For a linear module y = W a the gradient of row i is sum_t g_it a_it', with g the gradient at the
module's output. Rows of a batch share no computation, so one backward pass of the summed values
carries every row's g. A tap is the identity in the forward pass; in the backward pass it makes the
rows' gradients of its module and hands them on at once, so that no two modules' are held together.
All parameters are frozen meanwhile: the backward pass makes no gradient summed over the rows, and
ends at the first tap.

Linear, Conv1D and Embedding modules have formulas. Any other module that owns parameters (norms)
is differentiated alone, row by row under `vmap`; it must keep the rows apart in dimension 0. Not
covered: batch norms, which mix rows; experts that get a choice of all rows' tokens; parameters
that no module call reads (a weight used by `F.linear`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from deltaloom.core.errors import InputError


@dataclass(frozen=True)
class Rows:
    """The gradients of one parameter, one per row of the batch."""

    whole: Callable[[], Tensor]
    """Makes them: (b, *shape of the parameter)."""
    left: Tensor | None = None
    """(b, T, m) with gradient sum_t left_t right_t' for a matrix (m, n), where that is known."""
    right: Tensor | None = None
    """(b, T, n)."""


Sink = Callable[[str, Rows], None]
"""Takes each parameter's name and its rows' gradients, in the order the backward pass meets them.
"""


class Taps:
    """Per-row gradients of the parameters `names` (default: those that require gradients).

    Use as a context manager around forward passes; `backward` may be called several times for one
    forward pass with `retain_graph`. Raises InputError for a parameter that cannot be tapped.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str] | None = None, *, checkpointing: bool = False
    ) -> None:
        self.model = model
        self.checkpointing = checkpointing
        parameters = dict(model.named_parameters())
        if names is None:
            names = [name for name, p in parameters.items() if p.requires_grad]
        if absent := [name for name in names if name not in parameters]:
            raise InputError(f"the model has no parameter {absent[0]!r}")
        self.shapes = {name: parameters[name].shape for name in names}
        self._names = {id(parameters[name]): name for name in names}
        self._owners = {m: name for name, m in model.named_modules() if self._owned(m)}
        if mixing := [name for m, name in self._owners.items() if isinstance(m, _BatchNorm)]:
            raise InputError(
                f"{mixing[0]} mixes the rows of a batch, so its parameters have no "
                "gradient per row; leave them out"
            )
        self._sink: Sink | None = None
        self._alone = False  # while a module is differentiated by itself
        self._anchor = torch.zeros((), requires_grad=True)

    @property
    def size(self) -> int:
        """D: entries of one row's gradient over all parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def __enter__(self) -> Taps:
        self._frozen = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._handles = [self.model.register_forward_pre_hook(self._start, with_kwargs=True)]
        self._handles += [
            module.register_forward_hook(self._tap, with_kwargs=True) for module in self._owners
        ]
        self._wrapped = _checkpointed(self.model) if self.checkpointing else []
        return self

    def __exit__(self, *_: Any) -> None:
        for module in self._wrapped:
            del module.forward
        for handle in self._handles:
            handle.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._sums = {}

    def backward(self, values: Tensor, sink: Sink, *, retain_graph: bool = False) -> None:
        """Gradients of `values` (b,), one per row of the batch last put through the model.

        Raises InputError when the forward pass never called the module of a parameter.
        """
        self._sink, self._sums, self._met = sink, {}, {}
        self._seen: set[str] = set()
        try:
            values.sum().backward(retain_graph=retain_graph)
        finally:
            self._sink = None
        for name, total in self._sums.items():  # used less often than the forward pass said
            sink(name, _made(total))
            self._seen.add(name)
        if lost := self.shapes.keys() - self._seen:
            raise InputError(
                f"{min(lost)} gets no gradient through a module of its own; leave it out of the "
                "parameters"
            )

    def _owned(self, module: nn.Module) -> dict[str, str]:
        """Own name of each tapped parameter of `module` -> its name in the model."""
        own = module._parameters.items()
        return {key: self._names[id(p)] for key, p in own if p is not None and id(p) in self._names}

    def _start(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._alone:
            return
        first = next(v for v in (*inputs, *named.values()) if isinstance(v, Tensor))
        self._rows, self._width = len(first), first.shape[1] if first.dim() > 1 else 1
        self._calls: dict[str, int] = {}

    def _tap(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Any:
        if self._alone or not torch.is_grad_enabled():
            return output
        call = _Call(module, inputs, named)
        lengths = {len(value) if value.dim() else 0 for value in call.tensors}
        folded = lengths == {self._rows * self._width} and self._width > 1
        routed = "experts" in self._owners[module]
        apart = isinstance(output, Tensor) and (folded or (lengths and lengths <= {1, self._rows}))
        if routed or not apart:
            raise InputError(
                f"{self._owners[module]} does not keep the rows of the batch apart, so it "
                "has no gradient per row; leave its parameters out"
            )
        if len(output) == 1:  # one for all rows, as position embeddings are
            output = output.expand(self._rows, *output.shape[1:])
        names = self._owned(module)
        # A recomputed forward pass is no further use of the parameter.
        if torch._C._current_graph_task_id() == -1:
            for name in names.values():
                self._calls[name] = self._calls.get(name, 0) + 1
        give = partial(self._give, call, names)
        return _Tap.apply(self._anchor, give, output, *call.tensors)

    def _give(
        self, call: _Call, names: dict[str, str], values: Sequence[Tensor], g: Tensor
    ) -> None:
        assert self._sink is not None
        if len(g) != self._rows:  # rows and tokens in one dimension, as OPT has them
            g, *values = (x.reshape(self._rows, -1, *x.shape[1:]) for x in (g, *values))
        values = tuple(value.expand(self._rows, *value.shape[1:]) for value in values)
        self._alone = True
        found = call.gradients(tuple(names), values, g)
        self._alone = False
        for key, rows in found.items():
            name = names[key]
            if self._calls[name] == 1:
                self._seen.add(name)
                self._sink(name, rows)
                continue
            # A shared weight: what its uses add up to is known with the last of them.
            so_far = self._sums.pop(name, None)
            total = rows.whole() if so_far is None else so_far + rows.whole()
            self._met[name] = self._met.get(name, 0) + 1
            if self._met[name] == self._calls[name]:
                self._seen.add(name)
                self._sink(name, _made(total))
            else:
                self._sums[name] = total


class _Tap(torch.autograd.Function):
    """The identity on `output`, which also shows (inputs, gradient at output) to `give`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, give: Any, output: Tensor, *values: Tensor) -> Tensor:
        # The anchor makes the output require a gradient although every parameter is frozen.
        ctx.save_for_backward(*values)
        ctx.give = give
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values = ctx.saved_tensors  # read once: under checkpointing this recomputes
        with torch.no_grad():
            ctx.give(values, gradients[0])
        return None, None, gradients[0], *[None for _ in values]


class _Call:
    """One call of a module: what it was given, with the tensors set apart to be saved."""

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.module = module
        self.arguments = dict(enumerate(inputs)) | named
        self.at = [key for key, value in self.arguments.items() if isinstance(value, Tensor)]
        self.tensors = [self.arguments.pop(key) for key in self.at]

    def gradients(
        self, names: tuple[str, ...], values: tuple[Tensor, ...], g: Tensor
    ) -> dict[str, Rows]:
        """Own parameter name -> its rows, from the inputs and the gradient at the output, (b, *).

        A subclass may compute something else in its forward, so only the plain types go by formula.
        """
        forward = type(self.module).forward
        if forward is nn.Embedding.forward:
            return {"weight": Rows(partial(_scatter, self.module, values[0], g))}
        if forward is not nn.Linear.forward and type(self.module) is not _conv1d():
            return self._by_vmap(names, values, g)
        a, g = _three(values[0]), _three(g)  # (b, T, in), (b, T, out)
        left, right = (g, a) if forward is nn.Linear.forward else (a, g)
        found = {
            "weight": Rows(partial(_products, left, right), left, right),
            "bias": Rows(lambda: g.sum(1)),
        }
        return {name: found[name] for name in names}

    def _by_vmap(
        self, names: tuple[str, ...], values: tuple[Tensor, ...], g: Tensor
    ) -> dict[str, Rows]:
        own = {name: self.module._parameters[name] for name in names}

        def one(row: tuple[Tensor, ...], at_output: Tensor) -> dict[str, Tensor]:
            def output(parameters: dict[str, Tensor]) -> Tensor:
                given = self.arguments | {
                    key: value[None] for key, value in zip(self.at, row, strict=True)
                }
                inputs = tuple(given[i] for i in sorted(k for k in given if isinstance(k, int)))
                named = {key: value for key, value in given.items() if isinstance(key, str)}
                return functional_call(self.module, parameters, inputs, named)

            return vjp(output, own)[1](at_output[None])[0]

        found = vmap(one)(values, g)
        return {name: _made(found[name]) for name in names}


@cache
def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear, its weight (in, out)

    return Conv1D


def _three(x: Tensor) -> Tensor:
    """(b, ..., n) -> (b, T, n)."""
    return x.reshape(len(x), -1, x.shape[-1])


def _products(left: Tensor, right: Tensor) -> Tensor:
    """(b, T, m), (b, T, n) -> (b, m, n)."""
    if left.shape[-1] <= right.shape[-1]:
        return torch.bmm(left.transpose(1, 2), right)
    # The narrow side first is four times as fast on CPUs, and LoRA's are narrow.
    return torch.bmm(right.transpose(1, 2), left).transpose(1, 2)


def _scatter(module: Any, ids: Tensor, g: Tensor) -> Tensor:
    g = g.to(torch.promote_types(g.dtype, torch.float32))  # many addends
    out = g.new_zeros(len(ids), *module.weight.shape)  # (b, V, h)
    at = ids.reshape(len(ids), -1, 1).expand(-1, -1, g.shape[-1])
    out.scatter_add_(1, at, _three(g))
    if module.padding_idx is not None:
        out[:, module.padding_idx] = 0
    return out


def _made(rows: Tensor) -> Rows:
    return Rows(lambda: rows)


def _checkpointed(model: nn.Module) -> Sequence[nn.Module]:
    """Recompute each layer in the backward pass, in evaluation mode too; returns the layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"{type(model).__name__} has no layers that can be recomputed")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return layers
