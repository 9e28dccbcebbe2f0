"""The rows' gradients of every output of a batch, as the tangent kernels take them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from deltaloom.engine.taps import Rows, Taps


def differentiate(taps: Taps, values: Tensor, take: Callable[[int, str, Rows], None]) -> None:
    """One backward pass per column of `values` (b, k)."""
    last = values.shape[1] - 1
    for output in range(last + 1):
        taps.backward(values[:, output], partial(take, output), retain_graph=output < last)


def flat(rows: Rows) -> Tensor:
    """(b, D), at least float32."""
    if rows.left is None or rows.right is None:
        g = rows.whole()
        return g.to(torch.promote_types(g.dtype, torch.float32)).flatten(1)
    left, right = factors(rows)
    return torch.bmm(left.transpose(1, 2), right).flatten(1)


def factors(rows: Rows) -> tuple[Tensor, Tensor]:
    """(b, T, m) and (b, T, n), at least float32."""
    assert rows.left is not None
    assert rows.right is not None
    kind = torch.promote_types(rows.left.dtype, torch.float32)
    # Detached: what is held must not hold the graph that it came from.
    return rows.left.detach().to(kind), rows.right.detach().to(kind)
