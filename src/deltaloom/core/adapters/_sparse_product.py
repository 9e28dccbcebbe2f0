"""The product of activations with a few changed elements, and its gradients.

The changed elements are kept apart from the weight they change: `y + x @ delta.T` needs no copy of
the weight, loses nothing to a weight in bfloat16, and leaves a quantised weight as it is. Backward
saves the activations alone, which neighbouring layers share. On the CPU compiled loops touch the
elements only; elsewhere, and for types the loops do not know, the change is made dense for one
product and freed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SERIAL = 1 << 22
"""Multiply-adds below which threads cost more than they save (about a millisecond of work)."""

Watch = Callable[[Tensor, Tensor], None]
"""Called in backward with the gradient of the output (T, out) and the input (T, in)."""


class Layout(NamedTuple):
    """How a module's weight lies in memory."""

    rows: int
    columns: int
    transposed: bool
    """Stored (in, out), as in Conv1D; otherwise (out, in)."""

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return self.rows * self.columns

    def places(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Output and input of the elements at flat `indices`, both (n,) int64."""
        first = torch.div(indices, self.columns, rounding_mode="floor").long()
        second = indices.long() - first * self.columns
        return (second, first) if self.transposed else (first, second)

    def dense(self, values: Tensor, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The elements among zeros, as the weight is stored: (rows, columns)."""
        flat = torch.zeros(self.numel, dtype=dtype or values.dtype, device=values.device)
        flat[indices.long()] = values.to(flat.dtype)
        return flat.view(self.rows, self.columns)


def add_product(
    y: Tensor, x: Tensor, values: Tensor, indices: Tensor, layout: Layout, watch: Watch | None
) -> Tensor:
    """y (..., out) + x (..., in) times the elements `values` (n,) at `indices` (n,).

    `watch` sees the gradient of the output and the input of every backward pass. The sum has the
    type of y and is made in that of x, at least float32 on the CPU.
    """
    return _AddProduct.apply(y, x, values, indices, layout, watch)  # pyright: ignore


def gradient_at(g: Tensor, x: Tensor, indices: Tensor, layout: Layout) -> Tensor:
    """Elements (n,) at `indices` of the weight's gradient; g (T, out) and x (T, in)."""
    if _compiles(x):
        values = torch.empty(0, dtype=_kernel_type(x))
        return _gradients(g, x, values, indices, layout, True, False)[0]
    return dense_gradient(g, x, layout).flatten()[indices.long()]


def dense_gradient(g: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """The whole gradient, as the weight is stored, in the wider of the two types."""
    kind = torch.promote_types(g.dtype, x.dtype)  # under autocast they may differ
    g, x = g.to(kind), x.to(kind)
    return x.T @ g if layout.transposed else g.T @ x


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, values: Tensor, indices: Tensor, layout: Layout, watch: Any
    ) -> Tensor:
        ctx.save_for_backward(x, values, indices)
        ctx.layout, ctx.watch = layout, watch
        if _compiles(x):
            return _product(y, x, values, indices, layout)
        delta = layout.dense(values, indices, x.dtype)
        return y + (x @ delta if layout.transposed else x @ delta.T).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        x, values, indices = ctx.saved_tensors
        layout, (_, want_x, want_values, *_) = ctx.layout, ctx.needs_input_grad
        g, flat = grad.flatten(0, -2), x.flatten(0, -2)
        if _compiles(x):
            dvalues, dx = _gradients(g, flat, values, indices, layout, want_values, want_x)
        else:
            g = g.to(x.dtype)
            dvalues = dx = None
            if want_values:
                dvalues = dense_gradient(g, flat, layout).flatten()[indices.long()]
            if want_x:
                delta = layout.dense(values, indices, x.dtype)
                dx = g @ delta.T if layout.transposed else g @ delta
        if ctx.watch is not None:
            ctx.watch(g, flat)
        return (
            grad,
            dx.view(x.shape).to(x.dtype) if dx is not None else None,
            dvalues.to(values.dtype) if dvalues is not None else None,
            None,
            None,
            None,
        )


def _compiles(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _kernel_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _product(y: Tensor, x: Tensor, values: Tensor, indices: Tensor, layout: Layout) -> Tensor:
    from deltaloom.core.adapters import _sparse_kernels as kernels

    kind = _kernel_type(x)
    out = y.to(kind, copy=True, memory_format=torch.contiguous_format)
    rows, columns, order = _elements(indices, layout)
    x_, v = _array(x.flatten(0, -2), kind), _array(_ordered(values, order), kind)
    y_ = out.view(-1, out.shape[-1]).numpy()

    def work(first: int, last: int) -> None:
        kernels.add_product(x_, v, rows, columns, first, last, y_)

    _over_tokens(work, len(x_), len(v))
    return out.to(y.dtype)


def _gradients(
    g: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    layout: Layout,
    want_values: bool,
    want_x: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the values (n,) (empty if not wanted) and of x (T, in)."""
    from deltaloom.core.adapters import _sparse_kernels as kernels

    kind = _kernel_type(x)
    rows, columns, order = _elements(indices, layout)
    g_, x_, v = _array(g, kind), _array(x, kind), _array(_ordered(values, order), kind)
    dx = torch.zeros(x.shape if want_x else (0, 0), dtype=kind)
    dx_ = dx.numpy()

    def work(first: int, last: int) -> np.ndarray:
        part = np.zeros(len(rows) if want_values else 0, v.dtype)
        kernels.add_gradients(g_, x_, v, rows, columns, first, last, part, dx_)
        return part

    total = torch.from_numpy(sum(_over_tokens(work, len(x_), len(rows))))
    if order is not None and want_values:
        total = torch.empty_like(total).index_put_((order,), total)
    return total, dx if want_x else None


def _elements(indices: Tensor, layout: Layout) -> tuple[np.ndarray, np.ndarray, Tensor | None]:
    """Outputs and inputs (n,) int32 in the order of outputs, and that order if it is another."""
    rows, columns = layout.places(indices)
    order = torch.argsort(rows, stable=True) if layout.transposed else None
    rows, columns = _ordered(rows, order), _ordered(columns, order)
    return rows.int().numpy(), columns.int().numpy(), order


def _ordered(values: Tensor, order: Tensor | None) -> Tensor:
    return values if order is None or not len(values) else values[order]


def _array(tensor: Tensor, kind: torch.dtype) -> np.ndarray:
    return tensor.detach().to(kind).contiguous().numpy()


def _over_tokens(work: Callable[[int, int], Any], tokens: int, elements: int) -> list[Any]:
    """Do `work` on ranges of tokens, one for each of torch's threads; what each gave, in order."""
    threads = min(torch.get_num_threads(), tokens)
    if threads < 2 or tokens * elements < SERIAL:
        return [work(0, tokens)]
    cuts = [round(tokens * i / threads) for i in range(threads + 1)]
    # made anew each time: a pool does not outlive a fork
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, cuts[:-1], cuts[1:]))
